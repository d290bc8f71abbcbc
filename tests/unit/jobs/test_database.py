"""Waits are bounded, reading waits for no writer, and what only a person can mend is named."""

import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
import structlog
from fake_engine import FakeEngine, Pace, Turnstile, finish_job, journal, open_store
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from wanduet.config import EngineConfig
from wanduet.errors import OutputError, WanduetError
from wanduet.folders import never_make
from wanduet.jobs import writers
from wanduet.jobs.attempt import AttemptSettings
from wanduet.jobs.files import JobFiles
from wanduet.jobs.records import (
    Lease,
    NewJob,
    StaleLeaseError,
    StoreBrokenError,
    StoreBusyError,
    StoreDamagedError,
    StoreGoneError,
    StoreReadOnlyError,
    UnknownJobError,
)
from wanduet.jobs.runner import Runner, RunnerSettings
from wanduet.jobs.store import JobStore

pytestmark = pytest.mark.skipif("WANDUET_TEST_POSTGRES" in os.environ, reason="SQLite's files")
NEW = NewJob("ann", "miniature", {"prompt": "a fox", "seed": 1})


@contextmanager
def locked(folder: Path, how: str = "IMMEDIATE") -> Iterator[None]:
    """The write lock is held, as by another process's transaction."""
    with closing(sqlite3.connect(folder / "jobs.sqlite3", isolation_level=None, check_same_thread=False)) as other:
        other.execute(f"BEGIN {how}")
        other.execute("UPDATE state SET newest_id = newest_id")
        yield
        other.execute("ROLLBACK")


@pytest.mark.parametrize("how", ["IMMEDIATE", "EXCLUSIVE"])
def test_reading_and_opening_wait_for_no_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    with closing(open_store(tmp_path)) as store:
        done = finish_job(store)
    monkeypatch.setattr("wanduet.jobs.database.LOCK_SECONDS", 3600.0)  # who waits never ends
    monkeypatch.setattr("wanduet.jobs.database.OPEN_SECONDS", 3600.0)
    with locked(tmp_path, how), closing(open_store(tmp_path)) as store:
        assert store.get(done.id) == done
        assert len(store.list().jobs) == 1
        assert store.statistics().by_status == {"completed": 1}
        assert store.pulses() == ()
        assert store.claim("w", 30.0) is None
        assert store.expire() == store.sweep() == 0


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[JobStore]:
    """A store whose database another process has locked; its writers wait for half a second."""
    with closing(open_store(tmp_path)) as store:
        finish_job(store)
        store.writers.patience = 0.5
        with locked(tmp_path):
            yield store


def outcomes(work: Callable[[], object], count: int) -> list[Exception]:
    found: list[Exception] = []

    def call() -> None:
        try:
            work()
        except Exception as error:
            found.append(error)

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return found


def test_many_writers_wait_as_long_as_one(stuck: JobStore) -> None:
    stuck.writers.patience = 1.0
    began = time.monotonic()
    errors = outcomes(lambda: stuck.submit(NEW), 12)
    waited = time.monotonic() - began
    assert len(errors) == 12
    assert all(isinstance(error, OperationalError | StoreBusyError) for error in errors)
    assert not any(isinstance(error, StoreBrokenError) for error in errors), "worth another try"
    assert waited < 12 * stuck.writers.patience, "in sum, not one after the other"


def test_those_that_come_while_the_database_is_stuck_do_not_queue_up(
    stuck: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "STUCK_SECONDS", 0.0)
    monkeypatch.setattr(writers, "QUEUED_WHILE_STUCK", 0)
    stuck.writers.patience = 3600.0
    inside = threading.Event()
    monkeypatch.setattr(stuck.writers, "begun", inside.set)
    with stuck.writers.entered(), pytest.raises(StoreBusyError):
        stuck.submit(NEW)
    assert not inside.is_set()


def test_writing_goes_on_when_the_lock_is_given_back(tmp_path: Path) -> None:
    with closing(open_store(tmp_path)) as store:
        store.writers.patience = 0.2
        with locked(tmp_path), pytest.raises(SQLAlchemyError):
            store.submit(NEW)
        assert store.submit(NEW).created
        with store.database.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 5000


def corrupt(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:100] + b"\xff" * (len(data) - 100))


@pytest.mark.parametrize("content", [b"x" * 8192, b"SQLite format 3\0" + b"\xff" * 8000])
def test_what_is_no_database_is_named_at_the_start(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "jobs.sqlite3").write_bytes(content)
    with pytest.raises(StoreDamagedError, match="is damaged, or is no job database") as caught:
        open_store(tmp_path)
    assert caught.value.code == "store_damaged"
    assert str(tmp_path) in str(caught.value)
    assert ".recover" in str(caught.value)


def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    with closing(open_store(tmp_path)) as store:
        for _ in range(5):
            finish_job(store)
    corrupt(tmp_path / "jobs.sqlite3")
    with pytest.raises(StoreDamagedError):
        open_store(tmp_path)


def test_a_database_damaged_while_it_is_served_is_named(tmp_path: Path) -> None:
    with closing(open_store(tmp_path)) as store:
        job = finish_job(store)
        with closing(sqlite3.connect(tmp_path / "jobs.sqlite3")) as other:
            other.execute("PRAGMA writable_schema = ON")
            other.execute("UPDATE sqlite_master SET rootpage = 100000 WHERE name = 'jobs'")
            other.execute("PRAGMA schema_version = 1000")
            other.commit()
        for call in (lambda: store.get(job.id), lambda: store.submit(NEW), store.list):
            with pytest.raises(StoreDamagedError):
                call()


def test_a_read_only_database_is_read_and_named_when_written(tmp_path: Path) -> None:
    with closing(open_store(tmp_path)) as store:
        job = finish_job(store)
    url = f"sqlite:///file:{tmp_path / 'jobs.sqlite3'}?mode=ro&uri=true"
    with closing(JobStore(JobFiles(tmp_path), url)) as store:
        assert store.get(job.id) == job
        with pytest.raises(StoreReadOnlyError, match="read-only") as caught:
            store.submit(NEW)
        assert isinstance(caught.value, WanduetError)
        assert caught.value.code == "store_read_only"
        assert store.list().jobs == (job,), "and goes on being read"


def test_a_folder_in_the_databases_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite3").mkdir()
    with pytest.raises(StoreReadOnlyError, match="is no file"):
        open_store(tmp_path)


def test_a_database_without_its_tables_is_named(store: JobStore) -> None:
    with closing(sqlite3.connect(store.files.folder / "jobs.sqlite3")) as other:
        other.execute("DROP TABLE jobs")
    with pytest.raises(StoreGoneError):
        store.list()


def test_a_full_disk_is_worth_another_try(store: JobStore) -> None:
    finish_job(store)
    with store.database.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    large = NewJob("ann", "miniature", {"prompt": "x" * 500_000})
    with pytest.raises(OperationalError, match="full") as caught:
        store.submit(large)
    assert not isinstance(caught.value, StoreBrokenError)
    assert store.list(limit=1).jobs, "readable"
    with store.database.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    assert store.submit(large).created


# The data folder, removed or replaced while it is served.


def removed(folder: Path) -> None:
    shutil.rmtree(folder)


def moved(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


def replaced(folder: Path) -> None:
    removed(folder)
    open_store(folder).close()


def database_removed(folder: Path) -> None:
    (folder / "jobs.sqlite3").unlink()


def database_replaced(folder: Path) -> None:
    shutil.copy(folder / "jobs.sqlite3", folder / "copy")
    (folder / "copy").replace(folder / "jobs.sqlite3")


@pytest.mark.skipif(os.name != "posix", reason="Windows removes no folder in which files are open")
@pytest.mark.parametrize("change", [removed, moved, replaced, database_removed, database_replaced])
def test_nothing_is_acknowledged_into_a_folder_that_is_gone(tmp_path: Path, change: Callable[[Path], None]) -> None:
    data = tmp_path / "data"
    with closing(open_store(data)) as store:
        job = finish_job(store)
        change(data)
        for call in (lambda: store.submit(NEW), lambda: store.get(job.id), store.list, lambda: store.delete(job.id)):
            with pytest.raises(StoreGoneError, match=r"jobs.sqlite3|data") as caught:
                call()
        assert caught.value.code == "store_gone"
        if change is moved:
            data.with_name("moved").rename(data)
            assert store.get(job.id) == job
            assert store.submit(NEW).created


@pytest.mark.skipif(os.name != "posix", reason="Windows removes no folder in which files are open")
def test_what_is_written_while_the_folder_goes_is_not_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    with closing(open_store(data)) as store:
        begun = store.writers.begun
        monkeypatch.setattr(store.writers, "begun", lambda: (begun(), removed(data)))
        with pytest.raises(StoreGoneError):
            store.submit(NEW)


@contextmanager
def at_work(store: JobStore, pace: Pace | None = None) -> Iterator[threading.Thread]:
    engine = FakeEngine(EngineConfig(data_dir=store.files.folder), pace)
    settings = RunnerSettings(attempt=AttemptSettings(poll_seconds=0.005, progress_seconds=0.005))
    runner = Runner(store, engine, settings, hooks=engine.hooks)
    thread = threading.Thread(target=runner.run)
    thread.start()
    wait_for(lambda: runner.worker or not thread.is_alive())
    try:
        yield thread
    finally:
        runner.drain()
        thread.join(60)
        assert not thread.is_alive()


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def put_back(data: Path) -> bool:
    """Whether the moved folder stands in its place again, where the worker may write at any moment."""
    shutil.rmtree(data, ignore_errors=True)
    with suppress(OSError):
        data.with_name("moved").rename(data)
    return not data.with_name("moved").exists()


@pytest.mark.skipif(os.name != "posix", reason="Windows removes no folder in which files are open")
def test_a_worker_outlives_its_folder_and_goes_on_when_it_is_back(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with closing(open_store(data)) as store, at_work(store) as worker:
        with structlog.testing.capture_logs() as lines:
            moved(data)
            wait_for(lambda: [one for one in lines if "store cannot be reached" in one["event"]])
        assert worker.is_alive()
        wait_for(lambda: put_back(data))
        job_id = store.submit(NEW).job.id
        wait_for(lambda: store.get(job_id).status == "completed")


@pytest.mark.skipif(os.name != "posix", reason="Windows removes no folder in which files are open")
def test_a_job_builds_nothing_in_the_place_of_its_folder_and_goes_on_when_it_is_back(tmp_path: Path) -> None:
    data, gate = tmp_path / "data", Turnstile(2)
    with closing(open_store(data)) as store, at_work(store, gate):
        never_make(data)  # as a worker's process does
        job_id = store.submit(NEW).job.id
        wait_for(lambda: store.get(job_id).attempts and f"{job_id} step 1" in journal(data))
        with structlog.testing.capture_logs() as lines:
            moved(data)
            gate.open()
            wait_for(lambda: [one for one in lines if "moved or removed" in one.get("reason", "")])
        assert not data.exists()
        data.with_name("moved").rename(data)
        wait_for(lambda: store.get(job_id).status == "completed")
    steps = [line for line in journal(data) if "step" in line]
    assert len(steps) == len(set(steps)), "it went on where it was"


@pytest.mark.skipif(os.name != "posix", reason="Windows removes no folder in which files are open")
def test_what_is_said_of_a_disk_is_how_it_is_now_and_not_what_a_job_met_first(tmp_path: Path) -> None:
    data, gone = tmp_path / "data", threading.Event()

    def vanish(job: object, step: int) -> None:
        if step == 1 and not gone.is_set():
            moved(data)
            gone.set()
            raise OutputError("Cannot write video.mp4: No such file or directory.")  # as when it goes between two calls

    with structlog.testing.capture_logs() as lines, closing(open_store(data)) as store, at_work(store, vanish):
        never_make(data)
        job_id = store.submit(NEW).job.id
        wait_for(lambda: [one for one in lines if "moved or removed" in one.get("reason", "")])
        data.with_name("moved").rename(data)
        wait_for(lambda: store.get(job_id).status == "completed")


def test_a_broken_store_is_not_the_jobs_fault(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the video is made and the database cannot be used just then, the job is not failed for it."""
    broken = [True]
    check = store.check

    def check_once(lease: Lease) -> None:
        if threading.current_thread().name.startswith("job-") and broken:
            broken.pop()
            raise StoreReadOnlyError("The job database cannot be written.")
        check(lease)

    monkeypatch.setattr(store, "check", check_once)
    job_id = store.submit(NEW).job.id
    with at_work(store):
        wait_for(lambda: store.get(job_id).finished)
    assert not broken
    assert store.get(job_id).status == "completed"


@pytest.mark.parametrize("deleted", [True, False])
def test_a_job_that_is_not_found_loses_its_work_only_where_it_was_deleted(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, deleted: bool
) -> None:
    job_id = store.submit(NEW).job.id
    pace = Turnstile(1)
    with at_work(store, pace):
        work = store.files.work_path(job_id).parent
        wait_for(lambda: (work / "checkpoints.json").exists())
        if deleted:
            store.delete(job_id)
        else:  # as an index does that has lost a page
            lost = StaleLeaseError("not found"), UnknownJobError(job_id)
            for name, error in zip(("check", "get"), lost, strict=True):
                monkeypatch.setattr(store, name, raising(error))
            monkeypatch.setattr(store, "renew", raising(lost[0]))
            monkeypatch.setattr(store, "progress", raising(lost[0]))
            monkeypatch.setattr(store, "claim", lambda *_, **__: None)
        pace.open()
        wait_for(lambda: not [one for one in threading.enumerate() if one.name == f"job-{job_id}"])
        assert work.exists() != deleted


def raising(error: Exception) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


def test_a_store_that_is_closed_keeps_no_file_open(tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    process = psutil.Process()
    counted = process.num_fds if hasattr(process, "num_fds") else process.num_handles
    open_store(tmp_path).close()
    before = counted()
    for _ in range(5):
        open_store(tmp_path).close()
    assert counted() <= before
