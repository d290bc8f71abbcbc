"""What no job owns is moved away; nothing is where the database may be wrong."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
import structlog
from fake_engine import finish_job, open_store

from wanduet.jobs import sweep as sweeping
from wanduet.jobs.places import TRASH
from wanduet.jobs.records import make_id
from wanduet.jobs.schema import jobs
from wanduet.jobs.store import JobStore

sqlite = pytest.mark.skipif("WANDUET_TEST_POSTGRES" in os.environ, reason="a database file is damaged")
STRANGER = "video_" + "0" * 32


def orphans(store: JobStore, count: int) -> list[Path]:
    paths = [store.files.videos / f"{STRANGER[:-4]}{number:04d}.1-0.mp4" for number in range(count)]
    for path in paths:
        path.write_bytes(b"x")
    return paths


def many_jobs(store: JobStore, count: int) -> list[Path]:
    """Completed jobs with a file each, without the time that working takes."""
    first = finish_job(store)
    ids = [first.id]
    while len(ids) < count:
        ids.append(make_id(0.0, ids[-1]))
    with store.database.begin() as connection:
        row = dict(connection.execute(sa.select(jobs)).mappings().one())
        rows = [row | {"id": job_id, "files": [row["files"][0] | {"name": f"{job_id}.1-0.mp4"}]} for job_id in ids[1:]]
        connection.execute(sa.insert(jobs), rows)
    paths = [store.files.videos / f"{job_id}.1-0.mp4" for job_id in ids]
    for path in paths:
        path.write_bytes(b"x")
    return paths


def test_what_is_swept_lies_in_the_trash_and_the_log_says_where(store: JobStore, monkeypatch) -> None:
    done = finish_job(store)
    (orphan,) = orphans(store, 1)
    work = store.files.work_path(STRANGER[:-1] + "9")
    work.parent.mkdir()
    work.write_bytes(b"half")
    key = "ab" * 16
    store.files.note_checkpoints(work.parent.name, [key])
    (store.files.folder / "checkpoints").mkdir()
    (store.files.folder / "checkpoints" / f"{key}.safetensors").write_bytes(b"latents")
    with structlog.testing.capture_logs() as lines:
        assert store.sweep() == 2
    (line,) = [one for one in lines if one["log_level"] == "warning"]
    heap = Path(line["trash"])
    assert (line["count"], heap.parent) == (2, store.files.folder / TRASH)
    found = {str(path.relative_to(heap)) for path in heap.rglob("*") if path.is_file()}
    assert {f"videos/{orphan.name}", f"checkpoints/{key}.safetensors"} < found
    assert (heap / "work" / work.parent.name / work.name).read_bytes() == b"half"
    assert store.files.path(done.files[0].name) is not None
    heap.with_name("mine").mkdir()
    later = sweeping_time(monkeypatch, 6.9)
    store.sweep()
    assert heap.exists()
    sweeping_time(monkeypatch, 0.2, later)
    store.sweep()
    assert os.listdir(heap.parent) == ["mine"], "what wanduet did not put there stays"


def sweeping_time(monkeypatch: pytest.MonkeyPatch, days: float, now: float | None = None) -> float:
    import time

    later = (time.time() if now is None else now) + days * 86400
    monkeypatch.setattr("wanduet.jobs.places.time.time", lambda: later)
    return later


def test_far_more_unknown_than_known_files_are_left_alone(store: JobStore) -> None:
    finish_job(store)
    paths = orphans(store, 66)
    with structlog.testing.capture_logs() as lines:
        assert store.sweep() == 0
    (line,) = [one for one in lines if one["log_level"] == "error"]
    assert (line["unknown"], line["known"]) == (66, 1)
    assert "adopt" in line["hint"]
    assert all(path.exists() for path in paths)
    assert store.sweep(unknown_too=True) == 66
    assert len(list((store.files.folder / TRASH).rglob("*.mp4"))) == 66


def test_rows_that_somebody_deleted_by_hand_cost_no_video(store: JobStore) -> None:
    paths = many_jobs(store, 40)
    with store.database.begin() as connection:
        connection.execute(sa.delete(jobs))
    assert store.sweep() == 0
    assert all(path.exists() for path in paths)


def test_what_was_deleted_is_removed_for_good_however_much_it_is(store: JobStore) -> None:
    done = [finish_job(store) for _ in range(25)]
    for job in done:
        store.delete(job.id)
        (store.files.videos / job.files[0].name).write_bytes(b"written late")
    assert store.sweep() == 25
    assert list(store.files.videos.iterdir()) == []
    assert not (store.files.folder / TRASH).exists(), "who deletes a video wants it gone"


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[tuple[JobStore, list[Path]]]:
    """A store whose index of ids has lost one of its pages."""
    with closing(open_store(tmp_path)) as store:
        paths = many_jobs(store, 300)
    path = tmp_path / "jobs.sqlite3"
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (root,) = database.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_jobs_1'"
        ).fetchone()
        (size,) = database.execute("PRAGMA page_size").fetchone()
    with path.open("r+b") as file:
        file.seek((root - 1) * size)
        page = file.read(size)
        assert page[0] == 2, "an inner page"
        cell = int.from_bytes(page[12:14], "big")
        child = int.from_bytes(page[cell : cell + 4], "big")
        file.seek((child - 1) * size)
        assert file.read(1) == b"\x0a", "a leaf"
        file.seek((child - 1) * size + 3)
        file.write((1).to_bytes(2, "big"))  # of the page's entries only the first is left
    store = open_store(tmp_path)
    yield store, paths
    store.close()


@sqlite
def test_a_damaged_index_page_costs_no_video(damaged: tuple[JobStore, list[Path]]) -> None:
    store, paths = damaged
    assert store.list().jobs
    with structlog.testing.capture_logs() as lines:
        assert store.sweep() == 0
    assert [one["log_level"] for one in lines] == ["error"]
    assert "damaged" in lines[0]["event"]
    assert all(path.exists() for path in paths)


@sqlite
def test_the_last_look_is_at_the_table_itself(damaged: tuple[JobStore, list[Path]], monkeypatch) -> None:
    store, paths = damaged
    monkeypatch.setattr(sweeping, "find_damage", lambda connection: None)
    (orphan,) = orphans(store, 1)
    assert store.sweep() == 1
    assert not orphan.exists()
    assert all(path.exists() for path in paths)


def test_a_large_folder_is_looked_at_in_rounds(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "BATCH", 5)
    monkeypatch.setattr(sweeping, "ROUND_BATCHES", 2)
    monkeypatch.setattr(sweeping, "LARGEST_HEAP", 3)
    many_jobs(store, 30)
    paths = orphans(store, 4)
    rounds = []
    while not rounds or store.sweeping:
        rounds.append(store.sweep())
    assert rounds == [0, 0, 0, 3], "34 files, 10 in a round"
    while sum(path.exists() for path in paths):
        store.sweep()
    assert store.sweep() == 0


def test_a_file_that_cannot_be_moved_stays(store: JobStore) -> None:
    (store.files.folder / TRASH).write_text("not a folder")
    (orphan,) = orphans(store, 1)
    with structlog.testing.capture_logs() as lines:
        assert store.sweep() == 0
    assert "cannot be moved" in lines[0]["event"]
    assert orphan.exists()
