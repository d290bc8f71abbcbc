"""Jobs under attack: killed and paused workers, a cut log, many clients at once.

The engine only counts steps; what is attacked is the store, the leases and the worker around it.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from wanduet.config import EngineConfig
from wanduet.jobs.attempt import Attempt, AttemptSettings
from wanduet.jobs.records import Lease, NewJob, UnknownJobError
from wanduet.jobs.runner import RunnerSettings
from wanduet.jobs.store import JobStore
from wanduet.jobs.worker import URL_VARIABLE, WorkerProcess, WorkerSettings

FAKE_FOLDER = Path(__file__).parents[1] / "unit" / "jobs"
sys.path.insert(0, str(FAKE_FOLDER))
fake_engine = import_module("fake_engine")
content, journal, open_store = fake_engine.content, fake_engine.journal, fake_engine.open_store

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")

sqlite = pytest.mark.skipif("WANDUET_TEST_POSTGRES" in os.environ, reason="SQLite's own promises")
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(FAKE_FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "FAKE_STEP_SECONDS": "0.01",
}


def worker_settings(data: Path, lease_seconds: float = 1.0, max_crashes: int = 5) -> WorkerSettings:
    attempt = AttemptSettings(poll_seconds=0.02, progress_seconds=0.02, max_crashes=max_crashes)
    runner = RunnerSettings(lease_seconds=lease_seconds, attempt=attempt)
    return WorkerSettings(EngineConfig(data_dir=data), runner, engine="fake_engine:FakeEngine")


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


def submit(store: JobStore, prompt: str, steps: int = 20, seed: int = 7) -> str:
    request = {"prompt": prompt, "num_inference_steps": steps, "seed": seed}
    return store.submit(NewJob("ann", "m", request)).job.id


def wait(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError("it did not happen in time")


def steps_of(data: Path, job_id: str) -> list[str]:
    return [line for line in journal(data) if line.startswith(f"{job_id} step")]


def assert_exactly_once(store: JobStore, ids: list[str]) -> None:
    """Every job completed, each with its right video, and the engine finished none twice.

    A kill may leave files that no row holds. The service sweeps them away now and then, and never serves them.
    """
    store.sweep()
    lines = journal(store.files.folder)
    for number, job_id in enumerate(ids):
        job = store.get(job_id)
        assert job.status == "completed"
        path = store.files.path(job.files[0].name)
        assert path is not None
        assert path.read_bytes() == content(f"job {number}", number)
        assert lines.count(f"{job_id} done") <= 1  # 0: killed after the file stood and before the journal's line
    assert names(store) == {file.name for job_id in ids for file in store.get(job_id).files}
    assert list(store.files.work.iterdir()) == []


def names(store: JobStore) -> set[str]:
    return {path.name for path in store.files.videos.iterdir()}


def test_killed_in_the_middle_goes_on_and_finishes_once(tmp_path: Path, record_property) -> None:
    store = open_store(tmp_path)
    job_id = submit(store, "job 0", steps=40, seed=0)
    with worker(tmp_path) as first:
        wait(lambda: len(steps_of(tmp_path, job_id)) >= 15)
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert store.get(job_id).status == "in_progress"
    with worker(tmp_path, lease_seconds=60.0) as second:
        started = time.monotonic()
        wait(lambda: store.get(job_id).finished)
        assert time.monotonic() - started < 30, "a dead process's lease needs no waiting"
        second.terminate()
        assert second.wait(10) == 0
    assert_exactly_once(store, [job_id])
    assert store.get(job_id).attempts == 2
    redone = len(steps_of(tmp_path, job_id)) - 40
    record_property("steps_redone", redone)
    assert redone <= 1
    store.close()


def attack_with_kills(tmp_path: Path, num_jobs: int, kills: int, record_property) -> None:
    """A supervised worker is killed at random moments until all jobs are done, then once more looked at."""
    dice = random.Random(0)
    store = open_store(tmp_path)
    ids = [submit(store, f"job {number}", steps=30, seed=number) for number in range(num_jobs)]
    supervisor = WorkerProcess(
        worker_settings(tmp_path, max_crashes=10**6),
        fake_engine.postgres_url(tmp_path),
        ENVIRONMENT,
        pauses=(0.01, 0.1),
    )
    supervisor.start()
    done, gaps = 0, []
    while done < kills and not all(store.get(job_id).finished for job_id in ids):
        pid = wait(lambda: supervisor.ready and supervisor.pid)
        time.sleep(dice.uniform(0.0, 0.4))
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        wait(lambda pid=pid: supervisor.pid != pid)
        before = len(journal(tmp_path))
        done += 1
        wait(lambda before=before: len(journal(tmp_path)) > before or all(store.get(i).finished for i in ids))
        gaps.append(time.monotonic() - killed)
    wait(lambda: all(store.get(job_id).finished for job_id in ids), 30.0 + 2.0 * num_jobs)
    assert supervisor.stop() == 0
    lost = [job_id for job_id in ids if store.get(job_id).status != "completed"]
    record_property("kills", done)
    record_property("seconds_to_go_on_max", round(max(gaps), 2))
    print(f"kills {done}, jobs {num_jobs}, lost {len(lost)}, seconds to go on at most {max(gaps):.2f}")
    assert lost == []
    assert_exactly_once(store, ids)
    store.close()


def test_random_kills_lose_nothing(tmp_path: Path, record_property) -> None:
    attack_with_kills(tmp_path, num_jobs=5, kills=5, record_property=record_property)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_random_kills_lose_nothing(tmp_path: Path, record_property) -> None:
    attack_with_kills(tmp_path, num_jobs=200, kills=200, record_property=record_property)


def test_killed_between_publishing_and_its_commit_leaves_no_file(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    job_id = submit(store, "orphan 2", seed=0)
    supervisor = WorkerProcess(
        worker_settings(tmp_path), fake_engine.postgres_url(tmp_path), ENVIRONMENT, pauses=(0.01, 0.1)
    )
    supervisor.start()
    wait(lambda: store.get(job_id).finished)
    assert supervisor.stop() == 0
    job = store.get(job_id)
    assert (job.status, job.attempts, supervisor.restarts) == ("completed", 3, 2)
    assert names(store) == {file.name for file in job.files}, "the last attempt removes what those before it published"
    assert journal(tmp_path).count(f"{job_id} done") == 1
    store.close()


def test_a_poison_job_stops_and_the_next_one_runs(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    poison, good = submit(store, "die 3"), submit(store, "job 0", seed=0)
    supervisor = WorkerProcess(
        worker_settings(tmp_path, max_crashes=2),
        fake_engine.postgres_url(tmp_path),
        environment=ENVIRONMENT,
        pauses=(0.01, 0.1),
    )
    supervisor.start()
    wait(lambda: store.get(good).finished)
    supervisor.stop()
    job = store.get(poison)
    assert job.error is not None
    assert (job.status, job.error.code) == ("failed", "worker_crashed")
    assert store.get(good).status == "completed"
    assert supervisor.restarts == job.attempts
    store.close()


def test_stopped_past_its_lease_the_stale_commit_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    job_id = submit(store, "job 0", steps=30, seed=0)
    with worker(tmp_path, step_seconds=0.02, lease_seconds=3.0) as first:
        wait(lambda: len(steps_of(tmp_path, job_id)) >= 10)
        first.send_signal(signal.SIGSTOP)
        stale_token = store.get(job_id).token
        with worker(tmp_path, step_seconds=0.2, lease_seconds=3.0) as second:
            wait(lambda: store.get(job_id).token > stale_token)
            fresh = store.get(job_id)
            first.send_signal(signal.SIGCONT)
            # The first worker has 0.4 s of steps left, the second more: without fencing the first would win.
            wait(lambda: store.get(job_id).finished)
            first.terminate()
            assert first.wait(10) == 0
            second.terminate()
            second.wait(10)
    job = store.get(job_id)
    assert (job.status, job.token, job.attempts) == ("completed", fresh.token, 2)
    assert job.files[0].name == f"{job_id}.{fresh.token}-0.mp4"
    assert len(list(store.files.videos.glob("*.mp4"))) == 1
    store.close()


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
    assert names(store) == {file.name for file in job.files}
    store.close()


SUBMITTER = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from fake_engine import open_store
from wanduet.jobs.records import NewJob
store = open_store(Path(sys.argv[1]))
def submit(key):
    done = store.submit(NewJob("ann", "m", {"prompt": key}, idempotency_key=key))
    return key, done.job.id, done.created
with ThreadPoolExecutor(25) as pool:
    print(json.dumps(list(pool.map(submit, sys.argv[2:]))))
"""


def test_200_concurrent_submissions_of_20_keys_make_20_jobs(tmp_path: Path, record_property) -> None:
    keys = [f"key {number % 20}" for number in range(200)]
    random.Random(0).shuffle(keys)
    started = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SUBMITTER, str(tmp_path), *keys[part::4]],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )
        for part in range(4)
    ]
    answers = [tuple(answer) for process in processes for answer in json.loads(process.communicate(timeout=60)[0])]
    record_property("seconds", round(time.monotonic() - started, 2))
    store = open_store(tmp_path)
    rows = store.list(limit=100).jobs
    assert len(answers) == 200
    assert len(rows) == len({job_id for _, job_id, _ in answers}) == len({(k, j) for k, j, _ in answers}) == 20
    assert sum(created for _, _, created in answers) == 20
    store.close()


ACKNOWLEDGER = """
import sys
from pathlib import Path
from fake_engine import open_store
from wanduet.jobs.records import NewJob
store = open_store(Path(sys.argv[1]))
while True:
    job = store.submit(NewJob("ann", "m", {"prompt": "x"})).job
    print(job.id, flush=True)
"""


def test_killed_while_submitting_every_acknowledged_job_is_there(tmp_path: Path, record_property) -> None:
    dice = random.Random(0)
    acknowledged: list[str] = []
    for _ in range(6):
        command = [sys.executable, "-c", ACKNOWLEDGER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT}) as process:
            assert process.stdout is not None
            acknowledged.append(process.stdout.readline().strip())
            time.sleep(dice.uniform(0.0, 0.1))
            process.kill()
            acknowledged += [line.strip() for line in process.stdout if line.endswith("\n")]
    store = open_store(tmp_path)
    assert len(acknowledged) > 20
    for job_id in acknowledged:
        assert store.get(job_id).status == "queued"
    record_property("acknowledged", len(acknowledged))
    store.close()


@sqlite
def test_a_log_cut_after_the_last_sync_loses_nothing_acknowledged(tmp_path: Path, record_property) -> None:
    """What a power cut leaves: the log up to the last sync, and any part of what came later."""
    dice = random.Random(0)
    data = tmp_path / "data"
    store = open_store(data)
    with store.database.connect() as connection:  # folds the tables' creation into the database file
        connection.exec_driver_sql("COMMIT")
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    log = data / "jobs.sqlite3-wal"
    synced: list[tuple[int, str]] = []  # bytes of the log when each job was acknowledged
    for number in range(25):
        job_id = submit(store, f"job {number}")
        synced.append((log.stat().st_size, job_id))
    whole = log.read_bytes()
    cuts = lost = 0
    for number in range(60):
        size, _ = dice.choice(synced)
        cut = dice.randint(size, len(whole))
        kept = [job_id for end, job_id in synced if end <= size]
        copy = tmp_path / f"copy{number}"
        copy.mkdir()
        shutil.copy(data / "jobs.sqlite3", copy)
        (copy / "jobs.sqlite3-wal").write_bytes(whole[:cut])
        after = open_store(copy)
        for job_id in kept:
            try:
                after.get(job_id)
            except UnknownJobError:
                lost += 1
        with after.database.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
        after.close()
        cuts += 1
    record_property("cuts", cuts)
    assert (cuts, lost) == (60, 0)
    store.close()


def test_sigterm_drains_and_exits_with_0(tmp_path: Path, record_property) -> None:
    store = open_store(tmp_path)
    job_id = submit(store, "job 0", steps=1000, seed=0)
    with worker(tmp_path) as process:
        wait(lambda: len(steps_of(tmp_path, job_id)) >= 3)
        started = time.monotonic()
        process.terminate()
        assert process.wait(10) == 0
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
        assert process.wait(10) == 0
    assert store.get(job_id).status == "queued"
    store.close()


def test_settings_survive_the_command_line(tmp_path: Path) -> None:
    settings = worker_settings(tmp_path)
    assert WorkerSettings.from_json(settings.to_json()) == settings
    assert json.loads(settings.to_json())["engine"] == "fake_engine:FakeEngine"
