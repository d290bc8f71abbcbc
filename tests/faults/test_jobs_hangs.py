"""Workers that hang, that cannot be kept running, that are stopped at a bad moment: found, ended, started again, and said."""

import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from job_server import server
from job_workers import HANGS, journal, open_store, steps_of, submit, supervised, wait

from wanduet.jobs import supervisor as supervision
from wanduet.jobs.leases import BeatWatch, live_workers
from wanduet.jobs.supervisor import WorkerProcess
from wanduet.jobs.watchdog import HangSettings

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")


@contextmanager
def watched(data: Path, hangs: HangSettings = HANGS, **options: Any) -> Iterator[WorkerProcess]:
    process = supervised(data, hangs=hangs, **options)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.stop(1.0)


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("how", ["stop", "stick", "freeze"])
def test_a_worker_that_hangs_is_ended_and_its_job_goes_on(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by a signal; one thread that never comes back while the lease is kept; all threads at once."""
    store = open_store(tmp_path)
    job_id = submit(store, f"{how} 5", steps=10)
    with watched(tmp_path) as process:
        if how == "freeze":  # it is quiet from here on; while a worker imports, it is quiet for longer
            wait(lambda: f"{job_id} freeze" in journal(tmp_path))
            with monkeypatch.context() as patched:
                patched.setattr(process, "_hangs", replace(HANGS, beat_seconds=1.0))
                wait(lambda: process.hangs)
        job = wait(lambda: (job := store.get(job_id)).finished and job)
        assert (job.status, job.attempts) == ("completed", 2)
        assert (process.hangs, process.restarts) == (1, 1)
    assert len(steps_of(tmp_path, job_id)) == 10, "no step was done twice"
    if how != "stop":
        helper = int((tmp_path / "helper").read_text())
        wait(lambda: not lives(helper))
    store.close()


def test_a_loop_that_stands_still_ends_its_worker(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    (tmp_path / "stick-loop").touch()
    with watched(tmp_path, replace(HANGS, loop_seconds=5.0)) as process:
        wait(lambda: (tmp_path / "loop.stick").exists())
        job_id = submit(store, "job 0")
        assert wait(lambda: (job := store.get(job_id)).finished and job).status == "completed"
        assert process.hangs == 1
    store.close()


def test_a_job_cancelled_or_deleted_while_its_worker_hangs_stays_so(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    cancelled = submit(store, "stick 2")
    with watched(tmp_path, replace(HANGS, step_seconds=3600.0, cancel_seconds=1.0)) as process:
        wait(lambda: f"{cancelled} stick" in journal(tmp_path))
        store.cancel(cancelled)
        deleted, next_one = submit(store, "stick 3"), submit(store, "job 0")
        wait(lambda: f"{deleted} stick" in journal(tmp_path))
        store.delete(deleted)
        assert wait(lambda: (job := store.get(next_one)).finished and job).status == "completed"
        assert process.hangs == 2
        job = store.get(cancelled)
        assert job.error is not None
        assert (job.status, job.error.code, job.attempts) == ("failed", "cancelled", 1)
        wait(lambda: store.sweep() is not None and not (store.files.work / deleted).exists())
    store.close()


def test_a_job_that_hangs_at_each_attempt_is_given_up(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    job_id, next_one = submit(store, "hold 3"), submit(store, "job 0")
    with watched(tmp_path, replace(HANGS, phase_seconds=5.0), max_crashes=2):  # it goes on at the step that hangs
        wait(lambda: store.get(next_one).finished)
        job = store.get(job_id)
    assert job.error is not None
    assert (job.status, job.error.code) == ("failed", "worker_crashed")
    assert store.get(next_one).status == "completed"
    store.close()


def test_drained_while_it_hangs_it_is_killed_and_the_next_goes_on(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    job_id = submit(store, "stick 4", steps=8)
    patient = HangSettings()
    with watched(tmp_path, patient) as process:
        wait(lambda: f"{job_id} stick" in journal(tmp_path))
        assert process.stop(0.2) == -signal.SIGKILL
        assert live_workers(store.files.workers) == []
    with watched(tmp_path, patient):
        wait(lambda: store.get(job_id).finished)
    assert (store.get(job_id).status, len(steps_of(tmp_path, job_id))) == ("completed", 8)
    store.close()


def test_of_two_supervisors_on_one_folder_each_looks_after_its_own(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    job_id = submit(store, "stick 2")
    with watched(tmp_path) as first:
        wait(lambda: f"{job_id} stick" in journal(tmp_path))
        with watched(tmp_path) as second:
            wait(lambda: store.get(job_id).finished and first.hangs)  # either may be seen first
            assert (first.hangs, second.hangs, second.restarts) == (1, 0, 0)
            wait(lambda: first.trouble is None)
            assert second.trouble is None
        wait(lambda: first.trouble is None)
    assert store.get(job_id).status == "completed"
    store.close()


def fails_first(times: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The next forks of workers fail for want of memory."""
    start, left = subprocess.Popen, [times]

    def fork(command: Any, *values: Any, **named: Any) -> Any:
        if "wanduet.jobs.worker" in command and left[0]:
            left[0] -= 1
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return start(command, *values, **named)

    monkeypatch.setattr(supervision.subprocess, "Popen", fork)
    return left


def test_a_worker_that_cannot_be_forked_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = fails_first(10**6, monkeypatch)
    store = open_store(tmp_path)
    job_id = submit(store, "job 0")
    with watched(tmp_path) as process:
        assert "Cannot allocate memory" in wait(
            lambda: "cannot be kept running" in (process.trouble or "") and process.trouble
        )
        left[0] = 0
        wait(lambda: store.get(job_id).finished)
        assert (process.trouble, process.restarts) == (None, 0)
    store.close()


def test_stopped_while_no_worker_can_be_forked_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_first(10**6, monkeypatch)
    process = supervised(tmp_path)
    process._pauses = (3600.0, 3600.0)
    process.start()
    wait(lambda: "cannot be kept running" in (process.trouble or ""))
    assert process.stop(60.0) is None
    assert not process._thread.is_alive()


def test_a_worker_that_is_started_while_its_folder_is_away_makes_none(tmp_path: Path) -> None:
    data, away = tmp_path / "data", tmp_path / "away"
    store = open_store(data)
    job_id = submit(store, "stop 3", steps=6)
    with watched(data, HangSettings()) as process:
        wait(lambda: (data / f"{job_id}.stop").exists())
        data.rename(away)
        os.kill(wait(lambda: process.pid), signal.SIGKILL)
        wait(lambda: "exit status 1" in (process.trouble or ""))
        assert not data.exists()
        away.rename(data)
        wait(lambda: store.get(job_id).finished)
    assert (store.get(job_id).status, len(steps_of(data, job_id))) == ("completed", 6)
    store.close()


def test_an_error_of_the_watching_thread_costs_one_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet, errors = BeatWatch.quiet, [RuntimeError("what nobody thought of")]
    monkeypatch.setattr(
        BeatWatch, "quiet", lambda self: quiet(self) if not errors else (_ for _ in ()).throw(errors.pop())
    )
    store = open_store(tmp_path)
    job_id = submit(store, "job 0")
    with watched(tmp_path) as process:
        wait(lambda: store.get(job_id).finished)
        assert not errors
        assert process.trouble is None
    store.close()


def test_stopped_at_once_and_in_a_restart_pause_nothing_is_left(tmp_path: Path) -> None:
    at_once = supervised(tmp_path)
    at_once.start()
    at_once.stop()
    assert (at_once.pid, at_once._thread.is_alive()) == (None, False)
    pausing = supervised(tmp_path)
    pausing._pauses = (3600.0, 3600.0)
    pausing.start()
    os.kill(wait(lambda: pausing.pid), signal.SIGKILL)
    wait(lambda: "signal 9" in (pausing.trouble or ""))
    assert pausing.stop(60.0) == -signal.SIGKILL
    assert not pausing._thread.is_alive()
    assert live_workers(tmp_path / "workers") == []


def test_a_worker_that_dies_while_it_drains_leaves_its_job_to_the_next(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    job_id = submit(store, "stop 3", steps=6)
    with watched(tmp_path, HangSettings()) as process:
        wait(lambda: (tmp_path / f"{job_id}.stop").exists())
        pid = wait(lambda: process.pid)
        os.kill(pid, signal.SIGTERM)  # it is stopped, and so drains only in name
        os.kill(pid, signal.SIGKILL)
        wait(lambda: store.get(job_id).finished)
    assert (store.get(job_id).status, len(steps_of(tmp_path, job_id))) == ("completed", 6)
    store.close()


def test_a_worker_without_a_free_descriptor_says_what_it_waits_for(tmp_path: Path) -> None:
    """What `/ready` answers."""
    store = open_store(tmp_path)
    job_id = submit(store, "opened 1", steps=3)
    with watched(tmp_path) as process:
        assert "Too many open files" in wait(lambda: "waits until" in (process.trouble or "") and process.trouble)
        (tmp_path / "descriptors").touch()
        wait(lambda: store.get(job_id).finished)
        wait(lambda: process.trouble is None)
    job = store.get(job_id)
    assert (job.status, job.crashes) == ("completed", 0)
    store.close()


def test_a_server_says_that_its_worker_hangs_and_goes_on(tmp_path: Path) -> None:
    with server(tmp_path / "data", hangs=HANGS) as running:
        http = running.http

        def ready() -> tuple[int, str]:
            answer = http.get("/ready")
            return answer.status_code, str(answer.json().get("reason"))

        form = {"prompt": "stop 5", "seed": "0", "num_inference_steps": "10"}
        video = http.post("/v1/videos", data=form).json()["id"]
        _, reason = wait(lambda: (found := ready())[0] == 503 and found)
        assert "hung" in reason or "stands still" in reason
        wait(lambda: ready()[0] == 200)
        wait(lambda: http.get(f"/v1/videos/{video}").json()["status"] == "completed")
        assert "wanduet_worker_hangs_total 1.0" in http.get("/metrics").text


def test_what_lies_in_the_folder_of_a_server_is_not_executed(tmp_path: Path) -> None:
    folder, mark = tmp_path / "folder", tmp_path / "executed"
    folder.mkdir()
    for name in ("json", "structlog", "av", "torch", "sqlalchemy", "fake_engine", "wanduet", "sitecustomize"):
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'a').write({name!r})\nraise SystemExit(9)\n")
    with server(tmp_path / "data", folder=folder) as running:
        form = {"prompt": "job 0", "seed": "0", "num_inference_steps": "3"}
        video = running.http.post("/v1/videos", data=form).json()["id"]
        wait(lambda: running.http.get(f"/v1/videos/{video}").json()["status"] == "completed")
    assert not mark.exists()
