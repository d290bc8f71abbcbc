"""The job store: what is stored stays, one worker owns a job, stale commits are refused."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from fake_engine import open_store

from wanduet.errors import ConfigError
from wanduet.jobs.files import JobFiles
from wanduet.jobs.leases import SupervisorLock, WorkerLock
from wanduet.jobs.records import (
    IdempotencyError,
    JobError,
    Lease,
    Limits,
    NewJob,
    OutputFile,
    QueueFullError,
    StaleLeaseError,
    UnknownJobError,
    is_job_id,
    make_id,
)
from wanduet.jobs.schema import state
from wanduet.jobs.store import JobStore

ERROR = JobError("failed", "It broke.", "server_error", "prompt")


def new(prompt: str = "a red circle", owner: str = "ann", **values) -> NewJob:
    return NewJob(owner, "miniature", {"prompt": prompt, "seed": 1}, **values)


def submit(store: JobStore, *prompts: str) -> list[str]:
    return [store.submit(new(prompt)).job.id for prompt in prompts or ("a red circle",)]


def claim(store: JobStore, worker: str = "w1") -> Lease:
    lease = store.claim(worker, 30.0)
    assert lease is not None
    return lease


def publish(store: JobStore, lease: Lease) -> OutputFile:
    path = store.files.work_path(lease.job.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"0123456789")
    return store.files.publish(lease.job.id, lease.token, 0, path)


def test_a_job_from_start_to_end(tmp_path: Path) -> None:
    now = [1000.0]
    store = open_store(tmp_path, clock=lambda: now[0], retention_seconds=50.0)
    job = store.submit(new(remixed_from="video_x", priority=3)).job
    assert (job.status, job.created_at, job.remixed_from, job.priority) == ("queued", 1000.0, "video_x", 3)
    now[0] = 1010.0
    lease = claim(store)
    store.progress(lease, 42.0, "denoise", 7.0)
    running = store.get(job.id)
    assert (running.status, running.progress, running.phase, running.seconds_left) == (
        "in_progress",
        42.0,
        "denoise",
        7.0,
    )
    assert (running.started_at, running.attempts, running.token, running.worker) == (1010.0, 1, 1, "w1")
    now[0] = 1020.0
    file = publish(store, lease)
    done = store.complete(lease, [file], {"timings": {"denoise_s": 4.0}, "steps": 20})
    assert (done.status, done.progress, done.completed_at, done.expires_at) == ("completed", 100.0, 1020.0, 1070.0)
    assert done.files == (file,)
    assert done.worker is None
    assert store.statistics().stages["denoise_s"] == (4.0, 1)
    assert store.statistics().stages["queue_s"] == (10.0, 1)
    assert store.statistics().stages["steps"] == (4.0, 20)
    store.close()
    again = open_store(tmp_path)
    assert again.get(job.id) == done
    again.close()


def test_progress_never_goes_back(store: JobStore) -> None:
    submit(store)
    lease = claim(store)
    store.progress(lease, 60.0, "denoise")
    store.progress(lease, 20.0, "encode")
    assert (store.get(lease.job.id).progress, store.get(lease.job.id).phase) == (60.0, "encode")


@pytest.mark.skipif("WANDUET_TEST_POSTGRES" in os.environ, reason="SQLite's own promises")
def test_connections_mean_on_disk(store: JobStore) -> None:
    with store.database.connect() as connection:
        pragmas = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
        assert pragmas == ["wal", 2, 1]
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 5000


def test_idempotency_key_is_the_owners(store: JobStore) -> None:
    first = store.submit(new(idempotency_key="k"))
    again = store.submit(new(idempotency_key="k"))
    other = store.submit(new(owner="bob", idempotency_key="k"))
    assert (first.created, again.created, other.created) == (True, False, True)
    assert first.job.id == again.job.id != other.job.id
    with pytest.raises(IdempotencyError):
        store.submit(new("another prompt", idempotency_key="k"))


def test_repetition_answers_even_when_the_queue_is_full(store: JobStore) -> None:
    first = store.submit(new(idempotency_key="k"), Limits(queue=1))
    assert store.submit(new(idempotency_key="k"), Limits(queue=1)).job.id == first.job.id


@pytest.mark.parametrize(("limits", "personal"), [(Limits(queue=2), False), (Limits(per_owner=2), True)])
def test_full_queue_stores_nothing(store: JobStore, limits: Limits, personal: bool) -> None:
    for _ in range(2):
        store.submit(new(), limits)
    with pytest.raises(QueueFullError) as caught:
        store.submit(new(), limits)
    assert caught.value.personal is personal
    assert len(store.list().jobs) == 2
    store.cancel(store.list().jobs[0].id)
    store.submit(new(), limits)


def test_claims_follow_priority_then_age(store: JobStore) -> None:
    old, young = submit(store, "old", "young")
    urgent = store.submit(new("urgent", priority=1)).job.id
    assert [claim(store).job.id for _ in range(3)] == [urgent, old, young]
    assert store.claim("w1", 30.0) is None


def test_every_job_is_claimed_once_by_many(tmp_path: Path) -> None:
    stores = [open_store(tmp_path) for _ in range(4)]
    ids = submit(stores[0], *(f"job {i}" for i in range(60)))
    claimed: list[str] = []

    def work(index: int) -> None:
        while (lease := stores[index % 4].claim(f"w{index}", 30.0)) is not None:
            claimed.append(lease.job.id)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    for store in stores:
        store.close()
    assert sorted(claimed) == sorted(ids)


@pytest.mark.parametrize("worker", ["w1", "w2"])  # the same one again, too: its own older attempt is as stale
def test_stale_token_is_refused_everywhere(store: JobStore, worker: str) -> None:
    submit(store)
    stale = claim(store, "w1")
    assert store.recover(store.pulses()[0], 3) is not None
    fresh = claim(store, worker)
    assert fresh.token > stale.token
    file = OutputFile("video", 0, "x", 1)
    for commit in (
        lambda: store.renew(stale),
        lambda: store.check(stale),
        lambda: store.progress(stale, 99.0, "decode"),
        lambda: store.complete(stale, [file]),
        lambda: store.fail(stale, ERROR),
        lambda: store.release(stale),
        lambda: store.retry(stale, ERROR, 3),
    ):
        with pytest.raises(StaleLeaseError):
            commit()
    store.check(fresh)
    assert store.complete(fresh, []).status == "completed"
    with pytest.raises(StaleLeaseError):
        store.complete(stale, [])


def test_complete_may_be_repeated_by_its_own_lease(store: JobStore) -> None:
    submit(store)
    lease = claim(store)
    report = {"timings": {"total_s": 1.0}}
    assert store.complete(lease, [], report) == store.complete(lease, [], report)
    assert store.statistics().stages["total_s"] == (1.0, 1)
    with pytest.raises(StaleLeaseError):
        store.fail(lease, ERROR)


def test_recover_is_refused_when_the_beat_moved(store: JobStore) -> None:
    submit(store)
    lease = claim(store)
    (pulse,) = store.pulses()
    store.renew(lease)
    assert store.recover(pulse, 3) is None
    assert store.get(lease.job.id).status == "in_progress"


def test_poison_stops_but_progress_goes_on(store: JobStore) -> None:
    poison, slow = submit(store, "poison", "slow")
    for crash in range(3):
        lease = claim(store)
        assert lease.job.id == poison
        store.progress(lease, 10.0, "denoise")
        job = store.recover(store.pulses()[0], 3)
        assert job is not None
        assert job.status == ("failed" if crash == 2 else "queued")
    assert job.error is not None
    assert job.error.code == "worker_crashed"
    for percent in range(1, 20):
        lease = claim(store)
        assert lease.job.id == slow
        store.progress(lease, float(percent), "denoise")
        assert store.retry(lease, ERROR, 2).status == "queued"
    claim(store)
    store.recover(store.pulses()[0], 2)
    assert store.get(slow).status == "failed"


def test_going_down_with_the_whole_service_is_hardly_held_against_a_job(store: JobStore) -> None:
    (job_id,) = submit(store)
    supervisor = SupervisorLock(store.files.workers)

    def die() -> str:
        worker = WorkerLock(store.files.workers, supervisor.id)
        store.progress(claim(store, worker.worker), 5.0, "encode")
        worker.release()
        job = store.recover(store.pulses()[0], 3)
        assert job is not None
        return job.status

    assert [die() for _ in range(10)] == ["queued"] * 10
    assert store.get(job_id).crashes == 1, "a suspect: it runs alone"
    supervisor.acquire()
    assert [die() for _ in range(2)] == ["queued", "failed"], "alone, three times at one place"
    supervisor.release()
    (job_id,) = submit(store)
    assert [die() for _ in range(30)] == ["queued"] * 29 + ["failed"], "it may be what takes the service down"


def test_release_is_no_crash(store: JobStore) -> None:
    submit(store)
    for attempt in range(1, 6):
        lease = claim(store)
        assert lease.job.attempts == attempt
        store.release(lease)
    assert store.get(lease.job.id).crashes == 0


def test_cancel_in_every_state(store: JobStore) -> None:
    queued, running, completed, failed = submit(store, "d", "c", "b", "a")
    assert store.cancel(queued).error is not None
    leases = {}
    for _ in range(3):
        lease = claim(store)
        leases[lease.job.id] = lease
    job = store.cancel(running)
    assert (job.status, job.error and job.error.code, job.completed_at is not None) == ("failed", "cancelled", True)
    with pytest.raises(StaleLeaseError):
        store.renew(leases[running])
    store.complete(leases[completed], [])
    assert store.cancel(completed).status == "completed"
    store.fail(leases[failed], ERROR)
    assert store.cancel(failed).error == ERROR
    assert store.claim("w", 30.0) is None
    with pytest.raises(UnknownJobError):
        store.cancel("video_nothing")


def test_pages_cover_everything_though_the_cursor_is_deleted(store: JobStore) -> None:
    ids = submit(store, *(f"job {i}" for i in range(7)))
    store.submit(new(owner="bob"))
    seen: list[str] = []
    after = None
    while True:
        page = store.list("ann", after=after, limit=3, order="asc")
        seen += [job.id for job in page.jobs]
        after = page.jobs[-1].id
        for job in page.jobs:
            store.delete(job.id)
        if not page.has_more:
            break
    assert seen == ids
    assert [job.owner for job in store.list().jobs] == ["bob"]


def test_order_and_status(store: JobStore) -> None:
    ids = submit(store, "a", "b", "c")
    store.cancel(ids[1])
    assert [job.id for job in store.list().jobs] == ids[::-1]
    assert [job.id for job in store.list(status="failed").jobs] == [ids[1]]
    assert store.list(limit=0).has_more


def test_ids_grow_while_the_clock_goes_back(tmp_path: Path) -> None:
    now = [5000.0]
    store = open_store(tmp_path, clock=lambda: now[0])
    ids = []
    for moment in (5000.0, 8600.0, 1400.0, 5001.0):
        now[0] = moment
        ids.append(store.submit(new()).job.id)
        store.delete(ids[-1])  # the order must not depend on what is still there
    store.close()
    assert ids == sorted(ids)
    assert all(is_job_id(text) for text in ids)
    assert not is_job_id("video_../../etc/passwd")
    assert make_id(-1.0, None).startswith("video_000000000000")


def test_other_owners_jobs_do_not_exist(store: JobStore) -> None:
    (job_id,) = submit(store)
    assert store.get(job_id, "ann").id == job_id
    for call in (store.get, store.cancel, store.delete):
        with pytest.raises(UnknownJobError):
            call(job_id, "bob")


def test_delete_takes_the_files_too(store: JobStore) -> None:
    (job_id,) = submit(store)
    lease = claim(store)
    file = publish(store, lease)
    store.complete(lease, [file])
    assert store.files.path(file.name) is not None
    store.delete(job_id)
    assert list(store.files.videos.iterdir()) == list(store.files.work.iterdir()) == []
    with pytest.raises(UnknownJobError):
        store.delete(job_id)


def test_retention_by_time_and_by_disk(tmp_path: Path) -> None:
    now = [1000.0]
    store = open_store(tmp_path, clock=lambda: now[0], retention_seconds=100.0)
    ids = submit(store, *"abcde")
    for index in range(4):
        lease = claim(store)
        now[0] = 1000.0 + 30 * index
        store.complete(lease, [publish(store, lease)])
    now[0] = 1135.0
    assert store.expire() == 2
    assert [job.id for job in store.list(order="asc").jobs] == ids[2:]
    assert store.trim(max_bytes=20) == 0
    assert store.trim(max_bytes=15) == 1
    assert [job.id for job in store.list(order="asc").jobs] == ids[3:], "the queued one stays"
    store.close()


def test_sweep_removes_only_what_nobody_owns(store: JobStore) -> None:
    finished, running, deleted = submit(store, "a", "b", "c")
    kept, held = claim(store), claim(store)
    file = publish(store, kept)
    store.complete(kept, [file])
    publish(store, held)
    orphan = store.files.videos / f"{deleted}.1-0.mp4"
    orphan.write_bytes(b"x")
    older = store.files.videos / f"{finished}.0-0.mp4"
    older.write_bytes(b"x")
    stranger = store.files.videos / "holiday.mp4"
    stranger.write_bytes(b"x")
    store.delete(deleted)
    orphan.write_bytes(b"x")
    assert store.sweep() == 3  # the finished job's work folder, its older file, the deleted job's file
    left = {path.name for path in store.files.videos.iterdir()}
    assert left == {file.name, f"{running}.1-0.mp4", stranger.name}
    assert [path.name for path in store.files.work.iterdir()] == [running]


def test_a_sweep_asks_the_database_for_many_jobs_at_once(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanduet.jobs.sweep.BATCH", 10)
    kept = set()
    for _ in submit(store, *map(str, range(25))):
        lease = claim(store)
        kept.add(publish(store, lease).name)
        store.complete(lease, [OutputFile("video", 0, f"{lease.job.id}.1-0.mp4", 10)])
        (store.files.videos / f"{lease.job.id}.0-0.mp4").write_bytes(b"x")
    asked: list[str] = []
    sa.event.listen(store.database, "before_cursor_execute", lambda *values: asked.append(values[2]))
    assert store.sweep() == 50, "older files and work folders"
    assert {path.name for path in store.files.videos.iterdir()} == kept
    assert sum("SELECT" in text for text in asked) <= 8 + 3, "whose the folder is, what to forget, one scan"
    assert store.sweep() == 0
    for size in range(5, 25):
        monkeypatch.setattr("wanduet.jobs.sweep.BATCH", size)
        store.sweep()
    looks = {text for text in asked if "FROM jobs" in text and " IN (" in text and "||" not in text}
    assert len(looks) == 1, "each other text would be kept by the driver"


def test_what_dead_attempts_published_goes_with_the_job(store: JobStore) -> None:
    (job_id,) = submit(store)
    publish(store, claim(store, "dead"))
    store.recover(store.pulses()[0], 3)
    lease = claim(store)
    store.complete(lease, [publish(store, lease)])
    assert len(list(store.files.videos.iterdir())) == 2
    store.delete(job_id)
    assert list(store.files.videos.iterdir()) == []


def test_older_files_are_of_the_same_job_and_an_older_token(store: JobStore) -> None:
    ids = submit(store, "a", "b")
    for name in (f"{ids[0]}.9-0.mp4", f"{ids[0]}.10-0.mp4", f"{ids[0]}.11-0.webp", f"{ids[1]}.9-0.mp4", "a.mp4"):
        (store.files.videos / name).write_bytes(b"x")
    store.files.remove_older(ids[0], 10)
    left = {path.name for path in store.files.videos.iterdir()}
    assert left == {f"{ids[0]}.10-0.mp4", f"{ids[0]}.11-0.webp", f"{ids[1]}.9-0.mp4", "a.mp4"}


def test_only_published_names_lead_to_files(store: JobStore, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    name = f"{submit(store)[0]}.1-0.mp4"
    (store.files.videos / name).symlink_to(secret)
    for attempt in (name, "../secret", str(secret), "", "a.mp4", name.replace("1-0", "2-0")):
        assert store.files.path(attempt) is None
    for bad in ("..", "../x", "video_1"):
        with pytest.raises(ValueError, match="job id"):
            store.files.work_path(bad)


def test_sums_that_an_older_database_lacks_are_added(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with store.database.begin() as connection:
        connection.execute(sa.text("DELETE FROM stages WHERE name = 'steps'"))
        connection.execute(sa.text("UPDATE stages SET count = 7 WHERE name = 'total_s'"))
    store.close()
    again = open_store(tmp_path)
    assert (again.statistics().stages["steps"], again.statistics().stages["total_s"]) == ((0.0, 0), (0.0, 7))
    again.close()


@pytest.mark.skipif(os.name != "posix", reason="POSIX modes")
def test_other_users_of_the_machine_read_neither_prompts_nor_videos(tmp_path: Path) -> None:
    store = open_store(tmp_path / "data")
    store.submit(new())
    modes = {path: path.stat().st_mode & 0o077 for path in (tmp_path / "data", *(tmp_path / "data").iterdir())}
    assert set(modes.values()) == {0}, modes
    store.close()


def test_newer_database_is_refused(store: JobStore) -> None:
    with store.database.begin() as connection:
        connection.execute(sa.update(state).values(version=99))
    with pytest.raises(ConfigError, match="newer"):
        open_store(store.files.folder)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "nonsense"])
def test_addresses_that_would_lose_jobs(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError):
        JobStore(JobFiles(tmp_path), url)


def test_many_open_the_database_at_once(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def make(_: int) -> None:
        barrier.wait()
        open_store(tmp_path).close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make, range(8)))
