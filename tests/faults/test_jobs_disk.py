"""A disk that fills while a whole server works: nothing acknowledged is lost, and it goes on when there is room."""

import errno
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from job_workers import content, fake_engine, journal, open_store, published, submit, wait

from wanduet.config import EngineConfig
from wanduet.errors import OutputError
from wanduet.jobs.attempt import AttemptSettings
from wanduet.jobs.files import JobFiles
from wanduet.jobs.runner import Runner, RunnerSettings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mounts and limits of Linux")

PROGRAM = str(Path(__file__).with_name("full_disk.py"))


def survive(folder: Path, way: str, moments: int, record_property: Any) -> None:
    data = folder / "data"
    data.mkdir()
    command = [sys.executable, PROGRAM, str(data), way, "--moments", str(moments)]
    if way == "tmpfs":
        mounted = f'mount -t tmpfs -o size=160m none "{data}" && '
        try:
            subprocess.run(["unshare", "-rm", "sh", "-c", mounted + "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting is not permitted here")
        command = ["unshare", "-rm", "sh", "-c", mounted + 'exec "$@"', "sh", *command]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    seconds = found.pop("seconds to take the next job")
    found |= {"seconds to go on, median": statistics.median(seconds), "seconds to go on, max": max(seconds)}
    for name, value in found.items():
        record_property(name, value)
    print(way, found)
    assert (found["lost"], found["different"], found["unreadable"], found["ready"]) == (0, 0, 0, 200), found
    assert found["refused"] + found["accepted"] > 0


@pytest.mark.parametrize("way", ["tmpfs", pytest.param("limit", marks=pytest.mark.slow)])
def test_a_full_disk_is_survived(tmp_path: Path, way: str, record_property: Any) -> None:
    survive(tmp_path, way, 1, record_property)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", ["tmpfs", "limit"])
def test_a_full_disk_is_survived_at_many_moments(tmp_path: Path, way: str, record_property: Any) -> None:
    survive(tmp_path, way, 20, record_property)


@contextmanager
def at_work(runner: Runner) -> Iterator[None]:
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        yield
    finally:
        runner.drain()
        thread.join(120)


def run_one_job(data: Path) -> None:
    """One job through a worker in this process; whatever failed, it is made, with its files and no others."""
    store = open_store(data)
    job_id = submit(store, "job 0", steps=3, seed=0)
    engine = fake_engine.FakeEngine(EngineConfig(data_dir=data))
    settings = RunnerSettings(attempt=AttemptSettings(poll_seconds=0.005, progress_seconds=0.005))
    runner = Runner(store, engine, settings, hooks=engine.hooks)
    with at_work(runner):
        wait(lambda: store.get(job_id).finished)
    job = store.get(job_id)
    assert (job.status, job.error) == ("completed", None)
    path = store.files.path(job.files[0].name)
    assert path is not None
    assert path.read_bytes() == content("job 0", 0)
    store.sweep()
    assert published(store) == {file.name for file in job.files}
    assert list(store.files.work.iterdir()) == []
    assert journal(data).count(f"{job_id} done") >= 1
    store.close()


def test_each_single_write_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any) -> None:
    """The k-th time that the worker makes, names or syncs a file, the disk is full; for every k."""
    guard = threading.Lock()
    count = fatal = 0

    def attacked(real: Any) -> Any:
        def call(*values: Any, **named: Any) -> Any:
            nonlocal count
            with guard:
                count += 1
                fails = count == fatal
            if fails:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*values, **named)

        return call

    for data in (tmp_path / str(number) for number in range(1000)):
        open_store(data).close()  # what a worker finds there
        with monkeypatch.context() as patch:
            count = 0
            for name in ("fsync", "link", "mkdir", "rename", "replace"):
                patch.setattr(os, name, attacked(getattr(os, name)))
            run_one_job(data)
            writes = count
        if fatal > writes:
            break
        fatal += 1
    record_property("writes that failed", fatal - 1)
    assert fatal > 15


def test_an_attempt_ends_with_its_engines_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails beside a job that runs well must not leave it running beside the next attempt."""
    store, engine = open_store(tmp_path), fake_engine.FakeEngine(EngineConfig(data_dir=tmp_path))
    engine.pace = turnstile = fake_engine.Turnstile(0)
    note, running = JobFiles.note_checkpoints, []

    def full_at_first(files: JobFiles, job_id: str, keys: Any) -> None:
        running.append([job for job in engine.jobs if job._thread.is_alive()])
        if len(running) == 1:
            raise OutputError("Cannot write: the disk is full.")
        turnstile.open()
        note(files, job_id, keys)

    monkeypatch.setattr(JobFiles, "note_checkpoints", full_at_first)
    job_id = submit(store, "job 0", steps=3, seed=0)
    runner = Runner(store, engine, RunnerSettings(attempt=AttemptSettings(poll_seconds=0.005)), hooks=engine.hooks)
    with at_work(runner):
        try:
            wait(lambda: store.get(job_id).finished)
        finally:
            turnstile.open()  # or nothing ends
    assert store.get(job_id).status == "completed"
    assert running == [[engine.jobs[0]], [engine.jobs[1]]]
    store.close()
