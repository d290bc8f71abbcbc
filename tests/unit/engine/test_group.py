"""What the engine's side of a group makes of what its ranks report."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from wanduet.config import EngineConfig
from wanduet.engine import group as module
from wanduet.engine.group import EngineModels, Group
from wanduet.engine.job import Event, Job, OutputOptions
from wanduet.engine.ranks import DecodedRows, Denoised, Left
from wanduet.engine.strategies import GroupStrategy
from wanduet.errors import CancelledError, KernelFailedError
from wanduet.jobs.watchdog import HangSettings
from wanduet.models.vae.rows import Rows
from wanduet.planning.cost import Seconds
from wanduet.planning.hardware import detect
from wanduet.planning.planner import make_plan
from wanduet.request import GenerationRequest
from wanduet.stages.record import VideoRecord


def prepared(seconds: float) -> VideoRecord:
    """The record of a denoise that waited so long for its kernels."""
    record = VideoRecord(0, 1, attention="sdpa")
    record.timings.add("prepare_s", seconds)
    return record


class FakeRanks:
    """Starts and loads for 10 s, 2 s of them for kernels; then denoises for 3 s."""

    def __init__(self, clock: list[float]) -> None:
        self._clock = clock
        self._reports = [(10.0, Event("denoise", 0, 4)), (3.0, Denoised(torch.zeros(1), prepared(2.0), {}))]

    def __call__(self, *_: object, timeout_s: float) -> "FakeRanks":
        return self

    def send(self, assignment: object) -> int:
        return 0

    def receive(self, timeout: float, number: int) -> tuple[int, object]:
        seconds, report = self._reports.pop(0)
        self._clock[0] += seconds
        return 0, report


class StuckRanks:
    """Denoise for ever, whatever happens; `cancelled` are the tasks that they should leave."""

    def __init__(self, clock: list[float]) -> None:
        self._clock, self.begun, self.cancelled, self.closed = clock, False, [], False

    def __call__(self, *_: object, timeout_s: float) -> "StuckRanks":
        return self

    def send(self, assignment: object) -> int:
        return 7

    def cancel(self, task: int) -> None:
        self.cancelled.append(task)

    def receive(self, timeout: float, number: int) -> tuple[int, object]:
        if not self.begun:
            self.begun = True
            return 0, Event("denoise", 0, 4)
        self._clock[0] += timeout
        raise TimeoutError

    def close(self) -> None:
        self.closed = True


class StartedRanks:
    """How long collectives of each group that was started may take."""

    alive = True

    def __init__(self) -> None:
        self.timeouts: list[float] = []

    def __call__(self, *_: object, timeout_s: float) -> "StartedRanks":
        self.timeouts.append(timeout_s)
        return self

    def close(self) -> None:
        """Nothing to end."""


@pytest.fixture
def models(tmp_path) -> EngineModels:
    """Of an engine on two ranks."""
    return EngineModels(EngineConfig(model="miniature", devices="cpu,cpu", strategy="parallel", data_dir=tmp_path))


@pytest.fixture
def job(models, tmp_path) -> Job:
    """A planned job."""
    request = GenerationRequest(prompt="x").resolve(models.spec)
    plan = make_plan(request, models.memory, models.config, detect())
    return Job(request, plan, OutputOptions(tmp_path / "a.mp4"))


def test_collectives_have_the_time_of_the_longest_step(models, job, monkeypatch) -> None:
    """A forward at 1080p takes more than five minutes on an RTX 3060; the gather after it waits from its beginning."""
    started = StartedRanks()
    monkeypatch.setattr(module, "RankGroup", started)
    for step_s in (16.0, 337.0, 16.0):
        slow = replace(
            job.plan,
            prediction=replace(job.plan.prediction, seconds=Seconds(step_s * job.request.num_inference_steps, 1.0)),
        )
        with models.group(slow, job.request):
            pass
    assert started.timeouts == [300.0, 1011.0]  # a patient group serves shorter steps, too


def test_what_ranks_take_to_load_is_not_told_as_denoising(models, job, monkeypatch) -> None:
    clock = [0.0]
    video = job.videos[0]
    monkeypatch.setattr(module, "RankGroup", FakeRanks(clock))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    Group(models.config, job.plan).denoise(video, None)
    video.context.add_time("denoise_s", clock[0])  # as whoever asks for it does
    told = {name: video.timings[name] for name in ("load_s", "prepare_s", "denoise_s")}
    assert told == {"load_s": 8.0, "prepare_s": 2.0, "denoise_s": 3.0}


def test_a_group_whose_kernel_failed_starts_again_without_it(models, job, monkeypatch) -> None:
    """Ranks record the failure before they end, so those that start next do not use the kernel."""
    made = torch.ones(1)
    video = job.videos[0]
    outcomes = [
        KernelFailedError("sparse attention by fast", "no such instruction"),
        Denoised(made, prepared(0.0), {}),
    ]

    def receive(timeout: float, number: int) -> tuple[int, object]:
        outcome = outcomes.pop(0)
        if isinstance(outcome, KernelFailedError):
            raise outcome
        return 0, outcome

    closed: list[int] = []
    ranks = SimpleNamespace(send=lambda _: 0, receive=receive, close=lambda: closed.append(1))
    monkeypatch.setattr(module, "RankGroup", lambda *_, timeout_s: ranks)
    assert GroupStrategy(models).denoise(video, None) is made
    assert closed == [1]
    (note,) = video.record.notes
    assert note.startswith("denoise: group started again (The kernel for sparse attention by fast failed")


def test_ranks_that_do_not_leave_a_cancelled_job_are_ended_before_the_worker_is(models, job, monkeypatch) -> None:
    clock = [0.0]
    ranks = StuckRanks(clock)
    monkeypatch.setattr(module, "RankGroup", ranks)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(job, "emit", lambda event: job.cancel())  # once they have begun
    with pytest.raises(CancelledError), models.group(job.plan, job.request) as group:
        group.denoise(job.videos[0], None)
    assert ranks.cancelled == [7]
    assert ranks.closed
    assert models._group is None
    assert 1.0 < clock[0] < HangSettings().cancel_seconds - 2.0  # a little time is left to end them


def test_a_rank_that_has_left_a_decode_before_its_cancel_is_not_waited_for(models, job, monkeypatch) -> None:
    clock = [0.0]
    rows = DecodedRows(0, Rows.whole(32), np.zeros((1, 16, 32, 3), np.uint8), {}, "torch")
    reports = [rows, Left(), None, Left()]

    def receive(timeout: float, number: int) -> tuple[int, object]:
        clock[0] += timeout
        report = reports.pop(0) if reports else None
        if report is None:
            job.cancel()
            raise TimeoutError
        return 0, report

    cancelled: list[int] = []
    ranks = SimpleNamespace(send=lambda _: 7, receive=receive, cancel=cancelled.append)
    monkeypatch.setattr(module, "RankGroup", lambda *_, timeout_s: ranks)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    group = Group(models.config, job.plan)
    with pytest.raises(CancelledError):
        next(group.decode(job.videos[0], torch.zeros(16, 3, 4, 4)))
    assert cancelled == [7]
    assert not group.is_stuck
    assert reports == []
