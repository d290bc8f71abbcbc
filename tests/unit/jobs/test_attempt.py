"""An attempt whose keeper dies, whose commits are refused for good, that ends while something else happens."""

import sqlite3
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from fake_engine import FakeEngine, Turnstile, journal
from sqlalchemy.exc import DataError, IntegrityError, OperationalError
from test_runner import QUICK, finished, running, submit, wait

from wanduet.errors import WanduetError
from wanduet.jobs.attempt import Attempt
from wanduet.jobs.leases import WorkerLock
from wanduet.jobs.records import StaleLeaseError, UnknownJobError
from wanduet.jobs.runner import Runner
from wanduet.jobs.store import JobStore


@pytest.mark.parametrize("error", [RuntimeError("what nobody thought of"), OSError(24, "Too many open files")])
def test_a_keeper_that_dies_stops_its_job(store: JobStore, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    check, errors = JobStore.check, [error]

    def fail_once(self: JobStore, lease: Any) -> None:
        if errors and journal(store.files.folder):
            raise errors.pop()
        check(self, lease)

    monkeypatch.setattr(JobStore, "check", fail_once)
    job_id, gate = submit(store), Turnstile(2)
    with structlog.testing.capture_logs() as lines, running(store, pace=gate) as engine:
        wait(lambda: engine.jobs and engine.jobs[0].cancelled.is_set())
        gate.open()
        job = finished(store, job_id)
    assert (job.status, job.attempts, job.crashes) == ("completed", 2, 1)
    (line,) = [line for line in lines if "lease" in line["event"]]
    assert line["error"] == type(error).__name__
    assert any("fail_once" in place for place in line["where"])
    steps = [line for line in journal(store.files.folder) if "step" in line]
    assert len(steps) == len(set(steps)), "it went on where it was stopped"


def test_a_job_is_not_blamed_where_the_system_has_no_more_threads(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, left = threading.Thread.start, [5]

    def fail_first(self: threading.Thread) -> None:
        if self.name.startswith("lease-") and left[0]:
            left[0] -= 1
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", fail_first)
    job_id = submit(store)
    with running(store):
        job = finished(store, job_id)
    assert (job.status, job.attempts, job.crashes) == ("completed", 6, 0)


def refused(kind: type[sqlite3.Error], code: int) -> Exception:
    error = kind("refused")
    error.sqlite_errorcode = code
    return error


PERMANENT = [
    DataError("UPDATE", {}, Exception("value too long")),
    IntegrityError("UPDATE", {}, Exception("not null")),
    OperationalError("UPDATE", {}, refused(sqlite3.OperationalError, sqlite3.SQLITE_READONLY)),
    OperationalError("UPDATE", {}, refused(sqlite3.OperationalError, sqlite3.SQLITE_ERROR)),  # no such table
]


@pytest.mark.parametrize("error", PERMANENT, ids=["data", "integrity", "read-only", "no table"])
def test_what_the_database_never_takes_ends_the_job(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(self: JobStore, *values: Any) -> None:
        raise error

    monkeypatch.setattr(JobStore, "complete", refuse)
    job_id, next_one = submit(store), submit(store, "raise 0")
    with running(store):
        job = finished(store, job_id)
        assert finished(store, next_one).finished, "the worker is free"
    assert job.error is not None
    assert (job.status, job.error.code, job.attempts) == ("failed", "not_stored", 1)
    assert list(store.files.videos.iterdir()) == []


def test_a_database_that_takes_nothing_frees_the_worker_and_keeps_the_video(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: JobStore, *values: Any) -> None:
        raise OperationalError("UPDATE", {}, refused(sqlite3.DatabaseError, sqlite3.SQLITE_CORRUPT))

    job_id = submit(store)
    with monkeypatch.context() as broken:
        for name in ("complete", "fail"):
            broken.setattr(JobStore, name, refuse)
        attempt(store)
    assert store.files.work_path(job_id).exists()
    store.recover(store.pulses()[0], 3)
    with running(store) as engine:
        assert finished(store, job_id).status == "completed"
        assert not engine.jobs, "its video was there"


def attempt(store: JobStore, engine: FakeEngine | None = None) -> None:
    """One attempt at the next job, in this thread."""
    lock = WorkerLock(store.files.workers)
    lease = store.claim(lock.worker, 30.0)
    assert lease is not None
    engine = engine or FakeEngine(type("Config", (), {"data_folder": store.files.folder})())
    Attempt(store, engine, lease, threading.Event(), QUICK.attempt, engine.hooks).run()
    lock.release()


@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_cancelled_or_deleted_between_its_last_step_and_its_commit_nothing_is_published(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    job_id, complete = submit(store), JobStore.complete

    def too_late(self: JobStore, *values: Any) -> Any:
        getattr(self, how)(job_id)
        return complete(self, *values)

    monkeypatch.setattr(JobStore, "complete", too_late)
    attempt(store)
    assert list(store.files.videos.iterdir()) == []
    assert list(store.files.work.iterdir()) == []
    if how == "cancel":
        assert store.get(job_id).error.code == "cancelled"
    else:
        with pytest.raises(UnknownJobError):
            store.get(job_id)


@pytest.mark.parametrize("what", ["raise 2", "oom 2", "full 2"])
def test_a_job_that_fails_after_it_was_cancelled_stays_cancelled(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    job_id = submit(store, what)
    for name in ("fail", "retry", "release"):
        original = getattr(JobStore, name)

        def late(self: JobStore, *values: Any, original: Any = original) -> Any:
            self.cancel(job_id)
            return original(self, *values)

        monkeypatch.setattr(JobStore, name, late)
    attempt(store)
    job = store.get(job_id)
    assert (job.status, job.error.code, job.attempts) == ("failed", "cancelled", 1)
    assert list(store.files.work.iterdir()) == []


@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_drained_and_cancelled_or_deleted_at_once_it_is_not_put_back(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    job_id, release = submit(store, steps=20), JobStore.release

    def late(self: JobStore, *values: Any) -> None:
        getattr(self, how)(job_id)
        release(self, *values)

    monkeypatch.setattr(JobStore, "release", late)
    with running(store, pace=Turnstile(5)):
        wait(lambda: len(journal(store.files.folder)) == 5)
    if how == "cancel":
        assert (store.get(job_id).status, store.get(job_id).error.code) == ("failed", "cancelled")
    else:
        with pytest.raises(UnknownJobError):
            store.get(job_id)
    assert list(store.files.work.iterdir()) == []


def test_a_worker_without_threads_puts_its_job_back_unblamed(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    start, refusals = threading.Thread.start, [2]

    def short_of_threads(self: threading.Thread) -> None:
        if self.name.startswith("job-") and refusals[0]:
            refusals[0] -= 1
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", short_of_threads)
    job_id = submit(store)
    with running(store):
        job = finished(store, job_id)
    assert (job.status, job.attempts, job.crashes) == ("completed", 3, 0)


def test_work_that_cannot_be_fetched_costs_an_attempt_and_not_the_lease(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, errors = type(store.files).attempt, [OSError(5, "Input/output error")]

    def broken(self: Any, *values: Any) -> Any:
        if errors:
            raise errors.pop()
        return fetch(self, *values)

    monkeypatch.setattr(type(store.files), "attempt", broken)
    job_id = submit(store)
    with running(store):
        job = finished(store, job_id)
    assert (job.status, job.attempts, job.crashes) == ("completed", 2, 1)


def test_an_error_in_the_loop_puts_running_jobs_back_unblamed(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job_id = submit(store, steps=20)
    engine = FakeEngine(type("Config", (), {"data_folder": tmp_path})(), Turnstile(3))
    runner = Runner(store, engine, QUICK, hooks=engine.hooks)

    def break_down(self: Any) -> bool:
        if len(journal(tmp_path)) == 3:
            raise RuntimeError("what nobody thought of")
        return True

    monkeypatch.setattr(Runner, "_has_room", break_down)
    monkeypatch.setattr(type(runner._housekeeper), "run_once", lambda self: break_down(self) and 0)
    with pytest.raises(RuntimeError):
        runner.run()
    wait(lambda: store.get(job_id).status == "queued")
    assert store.get(job_id).crashes == 0


def test_causes_are_logged_by_place_and_never_by_message(store: JobStore) -> None:
    from wanduet.jobs.logs import describe_error

    def inner() -> None:
        raise ValueError("a secret")

    try:
        try:
            inner()
        except ValueError as error:
            raise StaleLeaseError("another secret") from error
    except StaleLeaseError as error:
        error.__traceback__ = None  # as whoever frees a failed job's tensors leaves it
        error.details = 'Traceback:\n  File "/x/rank.py", line 7, in step\n    secret()\nRuntimeError: secret'
        found = describe_error(error)
    assert found["error"] == "StaleLeaseError"
    assert "/x/rank.py:7 step" in found["where"]
    assert any(place.endswith("inner") for place in found["where"])
    assert "secret" not in str(found)


def test_a_device_that_is_lost_ends_the_worker_and_blames_no_neighbour(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an illegal memory access: CUDA answers nothing but that error any more, until the process ends."""
    unlucky, neighbour = submit(store, steps=20), submit(store, "y", steps=20)

    def lose(job: Any, step: int) -> None:
        if job.request.prompt == "x" and step == 3:
            wait(lambda: sum(neighbour in line for line in journal(store.files.folder)) == 3)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if job.request.prompt == "y" and step == 3:
            wait(job.cancelled.is_set)

    engine = FakeEngine(type("Config", (), {"data_folder": store.files.folder})(), lose)
    with pytest.raises(WanduetError, match="device"):
        Runner(store, engine, replace(QUICK, parallel=2), hooks=engine.hooks).run()
    jobs = [store.get(job_id) for job_id in (unlucky, neighbour)]
    assert [(job.status, job.crashes) for job in jobs] == [("queued", 1), ("queued", 0)]
    with running(store):
        assert finished(store, unlucky).status == finished(store, neighbour).status == "completed"
