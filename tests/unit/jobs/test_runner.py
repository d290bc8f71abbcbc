"""The worker's loop with an engine that only counts: results, resuming, retries, cancelling, draining."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_engine
import pytest
import structlog
from fake_engine import FakeEngine, Turnstile, content, journal
from sqlalchemy.exc import OperationalError

from wanduet.config import EngineConfig
from wanduet.jobs import runner as runner_module
from wanduet.jobs.attempt import AttemptSettings
from wanduet.jobs.files import JobFiles
from wanduet.jobs.housekeeping import Housekeeper
from wanduet.jobs.records import NewJob, StoredJob, UnknownJobError
from wanduet.jobs.runner import Runner, RunnerSettings
from wanduet.jobs.store import JobStore
from wanduet.jobs.watchdog import HangSettings, Watchdog
from wanduet.request import GenerationRequest

QUICK = RunnerSettings(tidy_seconds=0.0, attempt=AttemptSettings(poll_seconds=0.01, progress_seconds=0.01))


def submit(store: JobStore, prompt: str = "x", steps: int = 5, **values: Any) -> str:
    request = {"prompt": prompt, "num_inference_steps": steps, "seed": 7, **values}
    return store.submit(NewJob("ann", "m", request)).job.id


@contextmanager
def running(
    store: JobStore, settings: RunnerSettings = QUICK, pace: Any = None, **options: Any
) -> Iterator[FakeEngine]:
    engine = FakeEngine(EngineConfig(data_dir=store.files.folder), pace)
    options = {"hooks": engine.hooks, **options}
    runner = Runner(store, engine, settings, **options)
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        yield engine
    finally:
        runner.drain()
        thread.join(120)
        assert not thread.is_alive()


def wait(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.005)
    raise AssertionError("it did not happen in time")


def finished(store: JobStore, job_id: str) -> StoredJob:
    return wait(lambda: (job := store.get(job_id)).finished and job)


def test_a_job_becomes_files(store: JobStore) -> None:
    job_id = submit(store)
    with running(store):
        job = finished(store, job_id)
    assert job.status == "completed"
    assert [(f.variant, f.index) for f in job.files] == [("video", 0), ("thumbnail", 0), ("spritesheet", 0)]
    video = store.files.path(job.files[0].name)
    assert video is not None
    assert video.read_bytes() == content("x", 7)
    assert job.files[0].num_bytes == video.stat().st_size
    assert job.report["timings"] == {"denoise_s": 1.0, "total_s": 2.0}
    assert job.report["steps"] == job.request["num_inference_steps"]
    assert job.report["peak_memory_bytes"] == {"cpu": 123}
    assert list(store.files.work.iterdir()) == []


def test_several_videos(store: JobStore) -> None:
    job_id = submit(store, num_videos_per_prompt=3)
    with running(store):
        job = finished(store, job_id)
    videos = [store.files.path(f.name) for f in job.files if f.variant == "video"]
    assert [path and path.read_bytes() for path in videos] == [content("x", 7 + i) for i in range(3)]
    assert job.report["seeds"] == [7, 8, 9]


def test_progress_is_stored(store: JobStore) -> None:
    job_id, gate = submit(store, steps=10), Turnstile(0)
    with running(store, pace=gate):
        for step in range(1, 10):
            gate.let(1)
            wait(lambda step=step: store.get(job_id).progress >= 5 + 8.5 * step)
            job = store.get(job_id)
            assert (job.phase, job.progress) == ("denoise", pytest.approx(5 + 8.5 * step))
        gate.open()
        finished(store, job_id)


@pytest.mark.parametrize("parallel", [1, 3])
def test_jobs_run_side_by_side_only_when_asked(store: JobStore, parallel: int) -> None:
    ids = [submit(store) for _ in range(4)]
    gate = Turnstile(0)
    with running(store, RunnerSettings(parallel=parallel, attempt=QUICK.attempt), pace=gate) as engine:
        wait(lambda: len(engine.jobs) == parallel)
        time.sleep(0.1)  # time to start one more, which it must not
        assert len(engine.jobs) == store.statistics().by_status["in_progress"] == parallel
        gate.open()
        assert {finished(store, job_id).status for job_id in ids} == {"completed"}


def test_a_silent_job_keeps_its_lease(store: JobStore) -> None:
    job_id, gate = submit(store), Turnstile(0)
    with running(store, RunnerSettings(lease_seconds=0.2, housekeeping=False, attempt=QUICK.attempt), pace=gate):
        (pulse,) = wait(store.pulses)
        wait(lambda: store.pulses()[0].beat >= pulse.beat + 3)
        assert store.pulses()[0].token == pulse.token
        gate.open()
        assert finished(store, job_id).attempts == 1


def test_a_broken_engine_is_tried_again_then_given_up(store: JobStore) -> None:
    bad, good = submit(store, "raise 2"), submit(store)
    with running(store):
        job = finished(store, bad)
        assert finished(store, good).status == "completed"
    assert job.error is not None
    assert job.error.code == "internal_error"
    assert job.attempts in (3, 4)  # the first ones may have got farther than the one before
    assert "secret" not in job.error.message


def test_known_errors_fail_at_once(store: JobStore) -> None:
    memory, bad = submit(store, "oom 1"), submit(store, fps=1000)
    with running(store):
        first, second = finished(store, memory), finished(store, bad)
    assert first.error is not None
    assert (first.error.code, first.attempts) == ("out_of_memory", 1)
    assert str(store.files.folder) not in first.error.message
    assert second.error is not None
    assert (second.error.type, second.error.param) == ("invalid_request_error", "fps")


@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_a_running_job_ends_within_a_step(store: JobStore, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(fake_engine, "STEP_SECONDS", 0.05)
    job_id = submit(store, steps=1000)
    with running(store) as engine:
        wait(lambda: len(journal(store.files.folder)) >= 3)
        getattr(store, how)(job_id)
        wait(engine.jobs[0].cancelled.is_set)
        after = len(journal(store.files.folder))
        assert finished(store, submit(store, steps=1)).status == "completed", "the worker is free again"
        wait(lambda: not (store.files.work / job_id).exists())
    steps = [line for line in journal(store.files.folder) if line.startswith(f"{job_id} step")]
    assert len(steps) <= after + 1
    if how == "cancel":
        assert store.get(job_id).status == "failed"
    else:
        with pytest.raises(UnknownJobError):
            store.get(job_id)


def test_a_worker_that_a_cancelled_job_does_not_leave_is_ended_and_its_other_job_is_not_blamed(store: JobStore) -> None:
    leave, ended = threading.Event(), threading.Event()
    watchdog = Watchdog(HangSettings(cancel_seconds=0.05, look_seconds=0.01), end=ended.set)
    stuck, other = submit(store, "job 1"), submit(store, "hold 1")
    settings = replace(QUICK, parallel=2)
    with running(store, settings, lambda job, step: job.request.prompt == "job 1" and leave.wait(), watchdog=watchdog):
        wait(lambda: f"{other} step 0" in journal(store.files.folder))
        watchdog.start()
        store.cancel(stuck)
        assert ended.wait(60)
        job = store.get(other)
        assert (job.status, job.crashes, job.worker) == ("queued", 0, None)
        leave.set()
    assert store.get(stuck).status == "failed"


def test_drain_puts_the_job_back_and_the_next_worker_goes_on(store: JobStore) -> None:
    job_id = submit(store, steps=20)
    with running(store, pace=Turnstile(5)):
        wait(lambda: len(journal(store.files.folder)) == 5)
    job = store.get(job_id)
    assert (job.status, job.crashes, job.worker) == ("queued", 0, None)
    with running(store):
        job = finished(store, job_id)
    assert (job.status, job.attempts) == ("completed", 2)
    steps = [line for line in journal(store.files.folder) if "step" in line]
    assert len(steps) == 20, "no step was done twice"


def test_a_worker_that_is_drained_in_the_middle_of_its_turn_takes_nothing_more(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, run_once = submit(store, steps=20), Housekeeper.run_once

    def until_it_is_put_back(self: Housekeeper) -> None:
        run_once(self)
        if len(journal(store.files.folder)) == 5:
            in_an_iteration.set()
            wait(lambda: store.get(job_id).status == "queued")

    in_an_iteration = threading.Event()
    monkeypatch.setattr(Housekeeper, "run_once", until_it_is_put_back)
    with running(store, pace=Turnstile(5)):
        assert in_an_iteration.wait(120)
    assert store.get(job_id).attempts == 1


def test_drain_with_grace_lets_the_job_finish(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_engine, "STEP_SECONDS", 0.02)
    job_id = submit(store, steps=10)
    patient = RunnerSettings(attempt=AttemptSettings(poll_seconds=0.01, drain_seconds=600.0))
    with running(store, patient):
        wait(lambda: journal(store.files.folder))
    assert store.get(job_id).status == "completed"


def test_a_job_killed_before_its_commit_is_not_run_again(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = submit(store)
    broken = threading.Event()
    complete = JobStore.complete

    def refuse(self: JobStore, *values: Any) -> StoredJob:
        broken.set()
        raise OperationalError("UPDATE", {}, Exception("database or disk is full"))

    monkeypatch.setattr(JobStore, "complete", refuse)
    with running(store):
        assert broken.wait(120)
    assert store.get(job_id).status == "in_progress"
    assert list(store.files.videos.iterdir()) == [], "nothing is published that is not committed"
    monkeypatch.setattr(JobStore, "complete", complete)
    with running(store):
        assert finished(store, job_id).status == "completed"
    assert journal(store.files.folder).count(f"{job_id} done") == 1


def test_a_commit_whose_answer_was_lost_keeps_its_files(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = submit(store)
    answered = threading.Event()
    complete = JobStore.complete

    def lose_the_answer(self: JobStore, *values: Any) -> StoredJob:
        complete(self, *values)
        answered.set()
        raise OperationalError("COMMIT", {}, Exception("the connection is gone"))

    monkeypatch.setattr(JobStore, "complete", lose_the_answer)
    with running(store):
        assert answered.wait(60)
    job = store.get(job_id)
    assert job.status == "completed"
    assert {path.name for path in store.files.videos.iterdir()} == {file.name for file in job.files}


@pytest.mark.parametrize("count", [1, 2])
def test_videos_that_stand_are_not_made_again(store: JobStore, count: int) -> None:
    """Killed after the last video was written and before anything else was noted."""
    job_id = submit(store, num_videos_per_prompt=count)
    assert store.claim("dead", 1.0) is not None
    path = store.files.work_path(job_id)
    path.parent.mkdir(parents=True)
    for name in ["video.mp4"] if count == 1 else ["video-1.mp4", "video-2.mp4"]:
        path.with_name(name).write_bytes(b"whole")
    store.recover(store.pulses()[0], 3)
    with running(store) as engine:
        job = finished(store, job_id)
    assert (job.status, len(engine.jobs), job.attempts) == ("completed", 0, 2)
    assert sum(file.variant == "video" for file in job.files) == count


def test_a_full_disk_is_waited_for(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = [3]
    complete = JobStore.complete

    def full(self: JobStore, *values: Any) -> StoredJob:
        if refusals[0]:
            refusals[0] -= 1
            raise OperationalError("UPDATE", {}, Exception("database or disk is full"))
        return complete(self, *values)

    monkeypatch.setattr(JobStore, "complete", full)
    job_id = submit(store)
    with running(store):
        job = finished(store, job_id)
    assert (job.status, job.attempts, refusals) == ("completed", 1, [0])


def test_nothing_is_begun_on_a_full_disk(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [10.0]
    monkeypatch.setattr(JobFiles, "free_bytes", lambda self: free[0])
    job_id = submit(store)
    with structlog.testing.capture_logs() as lines, running(store) as engine:
        wait(lambda: lines and "disk is full" in lines[-1]["event"])
        assert (store.get(job_id).status, len(engine.jobs)) == ("queued", 0)
        free[0] = 1e12
        assert finished(store, job_id).status == "completed"
    assert sum("disk is full" in line["event"] for line in lines) == 1, "told once"


def test_a_job_that_met_a_full_disk_waits_for_room(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = [True, False, False, False, True]  # when it is begun; while it waits; when there is room again
    monkeypatch.setattr(JobFiles, "free_bytes", lambda self: 1e12 if len(rooms) < 2 or rooms.pop(0) else 0.0)
    job_id = submit(store, "full 2")
    with running(store):
        job = finished(store, job_id)
    # Without room it was put back unblamed; with room and failing all the same, it is given up with its own error.
    assert job.error is not None
    assert (job.error.code, job.crashes, rooms) == ("output_error", 3, [True])
    assert job.attempts > 3
    assert str(store.files.folder) not in job.error.message


@pytest.mark.parametrize("how", ["cancel", "drain"])
def test_waiting_for_room_can_be_ended(store: JobStore, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(JobFiles, "find_no_room", lambda self, num_bytes: "it is full")
    job_id = submit(store, "full 2")
    with structlog.testing.capture_logs() as lines, running(store):
        wait(lambda: any("cannot be written" in line["event"] for line in lines))
        if how == "cancel":
            store.cancel(job_id)
            wait(lambda: not (store.files.work / job_id).exists())
    assert store.get(job_id).status == ("failed" if how == "cancel" else "queued")


def test_a_video_without_previews_is_still_a_video(store: JobStore) -> None:
    def no_previews(path: Path) -> dict[str, bytes]:
        raise ValueError("cannot read it")

    job_id = submit(store)
    with running(store, hooks=replace(FakeEngine.hooks, make_previews=no_previews)):
        job = finished(store, job_id)
    assert (job.status, [f.variant for f in job.files]) == ("completed", ["video"])


def test_a_worker_survives_a_database_that_goes_away(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pulses = JobStore.pulses
    failures = [5]

    def flaky(self: JobStore) -> Any:
        if failures[0]:
            failures[0] -= 1
            raise OperationalError("SELECT", {}, Exception("disk I/O error"))
        return pulses(self)

    monkeypatch.setattr(JobStore, "pulses", flaky)
    job_id = submit(store)
    with running(store):
        assert finished(store, job_id).status == "completed"


def test_a_poison_job_does_not_take_its_neighbour_along(store: JobStore) -> None:
    """As if the process had died: leases are recovered with all that ran in it."""
    good, poison = submit(store, steps=3), submit(store, "y")
    for attempt in range(3):
        leases = [store.claim("w", 30.0, alone=True), store.claim("w", 30.0, alone=False)]
        assert [lease and lease.job.id for lease in leases] == ([good, poison], [good, None], [good, None])[attempt]
        for pulse in store.pulses():
            store.recover(pulse, max_crashes=5)
    assert (store.get(good).crashes, store.get(poison).crashes) == (3, 1)
    with running(store, RunnerSettings(parallel=2, attempt=QUICK.attempt)):
        assert finished(store, good).status == finished(store, poison).status == "completed"


@pytest.mark.parametrize("end", ["cancel", "delete"])
def test_checkpoints_go_with_their_job(store: JobStore, end: str) -> None:
    folder = store.files.folder / "checkpoints"
    folder.mkdir()
    others = folder / f"{'0' * 32}.safetensors"
    others.write_bytes(b"x")
    job_id = submit(store)
    with running(store, pace=Turnstile(1)):
        wait(lambda: store.files.preview(job_id))
        key = fake_engine.checkpoint_key(GenerationRequest(**store.get(job_id).request))
        for name in (f"{key}.safetensors", f"{key}.previous.safetensors"):
            (folder / name).write_bytes(b"x")
        getattr(store, end)(job_id)
        wait(lambda: list(folder.iterdir()) == [others])
        wait(lambda: list(store.files.work.iterdir()) == [])
    assert store.files.preview(job_id) is None


def test_a_deleted_jobs_checkpoints_go_though_its_worker_died(store: JobStore) -> None:
    job_id = submit(store)
    store.claim("w", 30.0)
    store.files.work_path(job_id).parent.mkdir()
    store.files.note_checkpoints(job_id, ["a" * 32, "../../secret"])
    checkpoint = store.files.folder / "checkpoints" / f"{'a' * 32}.safetensors"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"x")
    store.delete(job_id)
    assert checkpoint.exists(), "the worker may still live"
    assert store.sweep() == 1
    assert not checkpoint.exists()
    assert list(store.files.work.iterdir()) == []


def test_prompts_are_logged_only_when_asked(store: JobStore) -> None:
    for asked in (False, True):
        with structlog.testing.capture_logs() as lines:
            job_id = submit(store, "a secret plan")
            with running(store, replace(QUICK, attempt=replace(QUICK.attempt, log_prompts=asked))):
                finished(store, job_id)
        assert ("a secret plan" in str(lines)) == asked


def test_each_job_gives_free_memory_back(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[None] = []
    monkeypatch.setattr("wanduet.jobs.runner._give_heap_back", lambda: given.append(None))
    ids = [submit(store) for _ in range(3)]
    with running(store):
        wait(lambda: all(store.get(one).status == "completed" for one in ids))
        wait(lambda: len(given) >= 3)


def test_where_there_is_no_glibc_nothing_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in (object(), None):
        monkeypatch.setattr("wanduet.jobs.runner.ctypes.CDLL", lambda name, library=library: library)
        runner_module._give_heap_back()
