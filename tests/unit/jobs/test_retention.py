"""Retention in rounds, beside the queue, beside downloads and beside deletions."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from fake_engine import finish_job, open_store

from wanduet.jobs import retention
from wanduet.jobs.housekeeping import Housekeeper
from wanduet.jobs.places import TRASH
from wanduet.jobs.records import NewJob, StoreDamagedError, UnknownJobError
from wanduet.jobs.schema import deleted
from wanduet.jobs.store import JobStore

NEW = NewJob("ann", "miniature", {"prompt": "a fox", "seed": 1})


@pytest.fixture
def small_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "ROUND", 3)
    monkeypatch.setattr("wanduet.jobs.housekeeping.ROUND", 3)


def aged(folder: Path, count: int, waiting: int = 0) -> JobStore:
    """A store with so many jobs whose time is over, and others that wait."""
    now = [1000.0]
    store = open_store(folder, clock=lambda: now[0], retention_seconds=50.0)
    for _ in range(count):
        finish_job(store)
    now[0] = 2000.0
    for _ in range(waiting):
        store.submit(NEW)
    return store


@pytest.mark.usefixtures("small_rounds")
def test_a_round_is_small_and_the_queue_goes_on_between_two(tmp_path: Path) -> None:
    with closing(aged(tmp_path, 8, waiting=3)) as store:
        keeper = Housekeeper(store, max_crashes=3, tidy_seconds=3600.0)
        left = []
        for _ in range(3):  # as a worker's loop does
            keeper.run_once()
            left.append(store.statistics().by_status.get("completed", 0))
            assert store.claim("w", 30.0) is not None
        assert left == [5, 2, 0]
        assert list(store.files.videos.iterdir()) == []


@pytest.mark.usefixtures("small_rounds")
def test_after_the_last_round_it_rests(tmp_path: Path) -> None:
    with closing(aged(tmp_path, 4)) as store:
        keeper = Housekeeper(store, max_crashes=3, tidy_seconds=3600.0)
        for _ in range(2):
            keeper.run_once()
        assert store.list().jobs == ()
        orphan = store.files.videos / f"video_{'0' * 32}.1-0.mp4"
        orphan.write_bytes(b"x")
        keeper.run_once()
        assert orphan.exists(), "not before its time"


@pytest.mark.usefixtures("small_rounds")
def test_the_disk_limit_is_kept_in_rounds(store: JobStore) -> None:
    ids = [finish_job(store).id for _ in range(8)]
    queued = store.submit(NEW).job.id
    rounds = []
    while not rounds or rounds[-1]:
        rounds.append(store.trim(25))
    assert rounds == [3, 3, 0], "10 bytes each"
    assert [job.id for job in store.list(order="asc").jobs] == [*ids[6:], queued]


def test_the_disk_limit_is_looked_up_in_an_index(store: JobStore) -> None:
    if store.database.dialect.name != "sqlite":
        pytest.skip("SQLite's plans")
    finish_job(store)
    asked: list[tuple[str, tuple[object, ...]]] = []
    sa.event.listen(store.database, "before_cursor_execute", lambda *one: asked.append((one[2], one[3])))
    store.trim(0)
    with store.database.connect() as connection:
        plans = [
            str(connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", values).all())
            for text, values in list(asked)
            if text.startswith("SELECT") and "files_bytes" in text
        ]
    assert len(plans) == 2
    assert all("INDEX jobs_with_files" in plan and "TEMP B-TREE" not in plan for plan in plans), plans


def test_two_housekeepers_delete_each_job_once(tmp_path: Path) -> None:
    with closing(aged(tmp_path, 30)) as store, closing(open_store(tmp_path, clock=lambda: 2000.0)) as other:
        with ThreadPoolExecutor(2) as pool:
            counts = list(pool.map(lambda one: one.expire(), (store, other)))
        assert sum(counts) == 30
        assert store.list().jobs == ()


def test_what_a_kill_leaves_between_rows_and_files_is_removed_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(aged(tmp_path, 40)) as store:
        with monkeypatch.context() as patch:
            patch.setattr(retention, "remove_files", kill)
            with pytest.raises(KeyboardInterrupt):
                store.expire()
        assert store.list().jobs == ()
        assert len(list(store.files.videos.iterdir())) == 40
    with closing(open_store(tmp_path)) as store:
        assert store.sweep() == 40, "however many, for the database knows that it deleted them"
        assert not (tmp_path / TRASH).exists()


def kill(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.skipif(os.name != "posix", reason="Windows keeps a file that is open: a sweep removes it later")
@pytest.mark.parametrize("way", ["delete", "expire", "trim"])
def test_a_download_under_way_ends_whole(tmp_path: Path, way: str) -> None:
    with closing(aged(tmp_path, 1)) as store:
        (job,) = store.list().jobs
        path = store.files.path(job.files[0].name)
        assert path is not None
        with path.open("rb") as download:
            assert download.read(4) == b"0123"
            {"delete": lambda: store.delete(job.id), "expire": store.expire, "trim": lambda: store.trim(0)}[way]()
            assert download.read() == b"456789"
        assert store.files.path(job.files[0].name) is None
        with pytest.raises(UnknownJobError):
            store.get(job.id)
        assert store.sweep() == 0


def test_a_deletion_and_retention_of_one_job_are_both_content(tmp_path: Path) -> None:
    with closing(aged(tmp_path, 12)) as store:
        ids = [job.id for job in store.list().jobs]
        barrier = threading.Barrier(2)

        def delete() -> int:
            barrier.wait()
            gone = 0
            for job_id in ids:
                try:
                    store.delete(job_id)
                    gone += 1
                except UnknownJobError:
                    pass
            return gone

        def expire() -> int:
            barrier.wait()
            return store.expire()

        with ThreadPoolExecutor(2) as pool:
            counts = [pool.submit(delete), pool.submit(expire)]
            assert sum(one.result() for one in counts) == 12
        assert list(store.files.videos.iterdir()) == []


def test_a_job_that_goes_on_is_not_retained_away(store: JobStore) -> None:
    job_id = store.submit(NEW).job.id
    assert store._retention.delete([job_id]) == 0
    assert store.get(job_id).status == "queued"


def test_deleted_jobs_are_forgotten_in_the_end(tmp_path: Path) -> None:
    now = [1000.0]
    with closing(open_store(tmp_path, clock=lambda: now[0])) as store:
        store.delete(store.submit(NEW).job.id)
        for wait, left in ((86400.0, 1), (7 * 86400.0, 0)):
            now[0] += wait
            store.sweep()
            with store.database.connect() as connection:
                assert connection.scalar(sa.select(sa.func.count()).select_from(deleted)) == left


def test_retention_that_meets_damage_does_not_stop_the_queue(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged() -> int:
        raise StoreDamagedError("The job database is damaged.")

    store.submit(NEW)
    monkeypatch.setattr(store, "expire", damaged)
    Housekeeper(store, max_crashes=3).run_once()
    assert store.claim("w", 30.0) is not None


def test_each_of_the_caches_entries_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from wanduet.jobs import prompts
    from wanduet.media.embeddings import PromptEmbeds, save_embeddings

    (tmp_path / "embeddings").mkdir()
    for text in "abc":
        save_embeddings(
            tmp_path / "embeddings" / f"{text}.safetensors", PromptEmbeds(torch.ones(1, 8), text, "", "m", "f")
        )
    read: list[str] = []
    text_of = prompts._text_of
    monkeypatch.setattr(prompts, "_text_of", lambda path: (read.append(path.stem), text_of(path))[1])
    index = prompts.PromptIndex(tmp_path)
    assert [index.forget([{"prompt": text}]) for text in "zab"] == [0, 1, 1]
    assert sorted(read) == ["a", "b", "c"]
