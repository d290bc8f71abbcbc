"""Jobs under attack: killed and paused workers, a cut log, many clients at once.

The engine only counts steps; what is attacked is the store, the leases and the worker around it.
"""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from job_workers import (
    ENVIRONMENT,
    FAKE_FOLDER,
    Workers,
    assert_exactly_once,
    fake_engine,
    journal,
    open_store,
    published,
    steps_of,
    submit,
    supervised,
    wait,
    worker_settings,
)

from tests.forked import start_program
from wanduet.config import EngineConfig
from wanduet.jobs.attempt import Attempt, AttemptSettings
from wanduet.jobs.records import Lease, StoredJob
from wanduet.jobs.store import JobStore
from wanduet.jobs.worker import URL_VARIABLE, WorkerSettings

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")

sqlite = pytest.mark.skipif("WANDUET_TEST_POSTGRES" in os.environ, reason="SQLite's own promises")


@contextmanager
def worker(data: Path, *, step_seconds: float = 0.01, **options: Any) -> Iterator["subprocess.Popen[bytes]"]:
    environment = {**os.environ, **ENVIRONMENT, "FAKE_STEP_SECONDS": str(step_seconds)}
    environment.pop(URL_VARIABLE, None)
    if url := fake_engine.postgres_url(data):
        environment[URL_VARIABLE] = url
    command = [sys.executable, "-m", "wanduet.jobs.worker", worker_settings(data, **options).to_json()]
    with (
        open(data / "worker.log", "ab") as out,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out, env=environment) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


@posix
def test_killed_in_the_middle_goes_on_and_finishes_once(tmp_path: Path, record_property) -> None:
    store = open_store(tmp_path)
    job_id = submit(store, "once 15", steps=40, seed=0)
    with worker(tmp_path) as first:
        assert first.wait(120) == -signal.SIGKILL
    assert store.get(job_id).status == "in_progress"
    with worker(tmp_path, lease_seconds=1e6) as second:  # a dead process's lease needs no waiting
        wait(lambda: store.get(job_id).finished)
        second.terminate()
        assert second.wait(120) == 0
    job = store.get(job_id)
    assert (job.status, job.attempts) == ("completed", 2)
    assert published(store) == {file.name for file in job.files}
    assert journal(tmp_path).count(f"{job_id} done") == 1
    redone = len(steps_of(tmp_path, job_id)) - 40
    record_property("steps_redone", redone)
    assert redone == 0
    store.close()


@posix
def test_a_poison_job_stops_and_the_next_one_runs(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    poison, good = submit(store, "die 3"), submit(store, "job 0", seed=0)
    supervisor = supervised(tmp_path, max_crashes=2)
    supervisor.start()
    wait(lambda: store.get(good).finished)
    supervisor.stop()
    job = store.get(poison)
    assert job.error is not None
    assert (job.status, job.error.code) == ("failed", "worker_crashed")
    assert store.get(good).status == "completed"
    assert supervisor.restarts == job.attempts
    store.close()


def stop_past_its_lease(data: Path, lease_seconds: float) -> None:
    """A worker stops in the middle, another takes its job, then the first goes on."""
    store = open_store(data)
    job_id = submit(store, "stop 10", steps=30, seed=0)
    with worker(data, lease_seconds=lease_seconds) as first:
        os.waitpid(first.pid, os.WUNTRACED)
        while is_locked(data):  # it was stopped in the middle of a write: nobody can write until it goes on
            first.send_signal(signal.SIGCONT)
            time.sleep(0.01)
            first.send_signal(signal.SIGSTOP)
        stale = store.get(job_id)
        assert stale.status == "in_progress"
        # The first has 0.2 s of steps left, the second more: without fencing the first would win.
        with worker(data, step_seconds=0.2, lease_seconds=lease_seconds) as second:
            wait(lambda: store.get(job_id).token > stale.token)
            first.send_signal(signal.SIGCONT)
            wait(lambda: store.get(job_id).finished)
            for process in (first, second):
                process.terminate()
                assert process.wait(120) == 0
    job = store.get(job_id)
    assert (job.status, job.token, job.attempts) == ("completed", stale.token + 1, 2)
    assert job.files[0].name == f"{job_id}.{job.token}-0.mp4"
    assert published(store) == {file.name for file in job.files}
    store.close()


def is_locked(data: Path) -> bool:
    if "WANDUET_TEST_POSTGRES" in os.environ:
        return False
    with closing(sqlite3.connect(data / "jobs.sqlite3", timeout=0.5, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
        return False


@posix
def test_stopped_past_its_lease_the_stale_commit_is_refused(tmp_path: Path) -> None:
    stop_past_its_lease(tmp_path, 3.0)


@posix
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_often_stopped_past_its_lease(tmp_path: Path, record_property) -> None:
    for number in range(50):
        stop_past_its_lease(tmp_path / str(number), 3.0)
    record_property("stale workers", 50)


def test_a_stale_worker_that_has_finished_publishes_nothing(tmp_path: Path) -> None:
    """The worst case: the stopped worker wakes up with nothing left but its commit."""
    store = open_store(tmp_path)
    job_id = submit(store, "job 0", steps=2, seed=0)
    stale = store.claim("elsewhere.1.a", 30.0)
    assert stale is not None
    engine = fake_engine.FakeEngine(EngineConfig(data_dir=tmp_path))
    original = store.files.publish_bytes
    winner = []

    def slow(*values: Any) -> Any:  # between the check and the commit, another worker does the whole job
        if not winner:
            winner.append(store.recover(store.pulses()[0], 3))
            fresh = store.claim("elsewhere.2.b", 30.0)
            assert fresh is not None
            store.files.publish_bytes = original  # type: ignore[method-assign]
            run(fresh)
        return original(*values)

    def run(lease: Lease) -> None:
        settings = AttemptSettings(poll_seconds=0.01)
        Attempt(store, engine, lease, threading.Event(), settings, engine.hooks).run()

    store.files.publish_bytes = slow  # type: ignore[method-assign]
    run(stale)
    job = store.get(job_id)
    assert (job.status, job.token) == ("completed", stale.token + 1)
    assert published(store) == {file.name for file in job.files}
    store.close()


SUBMITTER = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from fake_engine import open_store
from sqlalchemy.exc import OperationalError
from wanduet.jobs.records import NewJob, StoreBusyError
store = open_store(Path(sys.argv[1]))
def submit(key):
    while True:
        try:
            done = store.submit(NewJob("ann", "m", {"prompt": key}, idempotency_key=key))
        except (StoreBusyError, OperationalError):  # on a busy machine: as a client, it comes again with its key
            time.sleep(0.1)
            continue
        return key, done.job.id, done.created
with ThreadPoolExecutor(25) as pool:
    print(json.dumps(list(pool.map(submit, sys.argv[3:]))))
"""


def test_200_concurrent_submissions_of_20_keys_make_20_jobs(tmp_path: Path, record_property) -> None:
    keys = [f"key {number % 20}" for number in range(200)]
    random.Random(0).shuffle(keys)
    started = time.monotonic()
    processes = [
        start_program(SUBMITTER, [str(tmp_path), str(FAKE_FOLDER), *keys[part::4]], tmp_path, os.environ)
        for part in range(4)
    ]
    answers = [tuple(answer) for process in processes for answer in json.loads(process.communicate(timeout=240)[0])]
    record_property("seconds", round(time.monotonic() - started, 2))
    store = open_store(tmp_path)
    rows = store.list(limit=100).jobs
    assert len(answers) == 200
    assert len(rows) == len({job_id for _, job_id, _ in answers}) == len({(k, j) for k, j, _ in answers}) == 20
    assert sum(created for _, _, created in answers) == 20
    store.close()


def jump_clocks(data: Path, num_jobs: int, record_property) -> None:
    """Two workers whose wall clocks jump an hour back or forth at every look; one is killed in the middle."""
    store = open_store(data)
    workers = Workers(data, jumps=3600.0)
    ids = [submit(store, f"job {number}", steps=10, seed=number) for number in range(num_jobs)]
    for _ in range(2):
        workers.start()
    wait(lambda: store.statistics().by_status.get("completed", 0) >= num_jobs // 2, 600)
    workers.kill_one(random.Random(0))
    wait(lambda: all(store.get(job_id).finished for job_id in ids), 600)
    assert workers.stop() == [0]
    again = [job_id for job_id in ids if store.get(job_id).attempts > 1]
    found = {"jobs": num_jobs, "live leases stolen": max(0, len(again) - 1), "dead ones stuck": 0}
    print(found)
    record_property("live leases stolen", found["live leases stolen"])
    assert len(again) <= 1, "only what the killed worker had was begun again"
    assert_exactly_once(store, ids)
    store.close()


@posix
def test_clocks_that_jump_steal_no_lease(tmp_path: Path, record_property) -> None:
    jump_clocks(tmp_path, 20, record_property)


@posix
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_clocks_that_jump_steal_none_of_many_leases(tmp_path: Path, record_property) -> None:
    jump_clocks(tmp_path, 1000, record_property)


AS_FAR_AS = {"queued": ("queued", "in_progress", "completed"), "completed": ("completed",)}


def cut_the_log(folder: Path, jobs: int, cuts: int, record_property) -> None:
    """What a power cut leaves: the log up to the last sync, and any part of what came later."""
    dice = random.Random(0)
    data = folder / "data"
    store = open_store(data)
    with store.database.connect() as connection:  # folds the tables' creation into the database file
        connection.exec_driver_sql("COMMIT")
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    log = data / "jobs.sqlite3-wal"
    synced: list[tuple[int, str, str]] = []  # bytes of the log when each job was acknowledged, and its state then
    for number in range(jobs):
        job_id = submit(store, f"job {number}")
        synced.append((log.stat().st_size, job_id, "queued"))
        if number % 3 == 0:
            lease = store.claim("w", 30.0)
            assert lease is not None
            store.complete(lease, [])
            synced.append((log.stat().st_size, lease.job.id, "completed"))
    whole = log.read_bytes()
    lost = 0
    for number in range(cuts):
        size = dice.choice(synced)[0]
        cut = dice.randint(size, len(whole))
        copy = folder / f"copy{number}"
        copy.mkdir()
        shutil.copy(data / "jobs.sqlite3", copy)
        (copy / "jobs.sqlite3-wal").write_bytes(whole[:cut])
        after = open_store(copy)
        found = {job.id: job.status for job in all_jobs(after)}
        promised = {job_id: status for end, job_id, status in synced if end <= size}
        lost += sum(found.get(job_id) not in AS_FAR_AS[status] for job_id, status in promised.items())
        with after.database.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
        after.close()
        shutil.rmtree(copy)
    record_property("cuts", cuts)
    record_property("lost", lost)
    print({"cuts": cuts, "acknowledged states": len(synced), "lost": lost})
    assert lost == 0
    store.close()


def all_jobs(store: JobStore) -> Iterator[StoredJob]:
    after = None
    while True:
        page = store.list(after=after, limit=100)
        yield from page.jobs
        if not page.has_more:
            return
        after = page.jobs[-1].id


@posix
@sqlite
def test_a_log_cut_after_the_last_sync_loses_nothing_acknowledged(tmp_path: Path, record_property) -> None:
    cut_the_log(tmp_path, 25, 60, record_property)


@posix
@sqlite
@pytest.mark.slow
def test_a_log_cut_at_many_places_loses_nothing_acknowledged(tmp_path: Path, record_property) -> None:
    cut_the_log(tmp_path, 100, 2000, record_property)


@posix
def test_sigterm_drains_and_exits_with_0(tmp_path: Path, record_property) -> None:
    store = open_store(tmp_path)
    job_id = submit(store, "job 0", steps=1000, seed=0)
    with worker(tmp_path) as process:
        wait(lambda: len(steps_of(tmp_path, job_id)) >= 3)
        started = time.monotonic()
        process.terminate()
        assert process.wait(120) == 0
        record_property("drain_seconds", round(time.monotonic() - started, 2))
    assert (store.get(job_id).status, store.get(job_id).crashes) == ("queued", 0)
    store.close()


def test_a_worker_ends_with_whoever_started_it(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    job_id = submit(store, "job 0", steps=1000, seed=0)
    with worker(tmp_path) as process:
        wait(lambda: steps_of(tmp_path, job_id))
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(120) == 0
    assert store.get(job_id).status == "queued"
    store.close()


def test_settings_survive_the_command_line(tmp_path: Path) -> None:
    settings = worker_settings(tmp_path)
    assert WorkerSettings.from_json(settings.to_json()) == settings
    assert json.loads(settings.to_json())["engine"] == "fake_engine:FakeEngine"
