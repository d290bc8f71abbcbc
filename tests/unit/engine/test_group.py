"""What the engine's side of a group makes of what its ranks report."""

from types import SimpleNamespace

import torch

from wanduet.config import EngineConfig
from wanduet.engine import group as module
from wanduet.engine.build import Models
from wanduet.engine.group import Group
from wanduet.engine.hardware import detect
from wanduet.engine.job import Event, Job, OutputOptions
from wanduet.engine.plan import make_plan
from wanduet.engine.ranks import Denoised
from wanduet.request import GenerationRequest


class FakeRanks:
    """Starts and loads for 10 s, 2 s of them for kernels; then denoises for 3 s."""

    def __init__(self, clock: list[float]) -> None:
        self._clock = clock
        self._reports = [(10.0, Event("denoise", 0, 4)), (3.0, Denoised(torch.zeros(1), "sdpa", (), {}, 2.0))]

    def __call__(self, *_: object) -> "FakeRanks":
        return self

    def send(self, assignment: object) -> int:
        return 0

    def receive(self, timeout: float, number: int) -> tuple[int, object]:
        seconds, report = self._reports.pop(0)
        self._clock[0] += seconds
        return 0, report


def test_what_ranks_take_to_load_is_not_told_as_denoising(tmp_path, monkeypatch) -> None:
    config = EngineConfig(model="miniature", devices="cpu,cpu", strategy="parallel", data_dir=tmp_path)
    models, clock = Models(config), [0.0]
    request = GenerationRequest(prompt="x").resolve(models.spec)
    plan = make_plan(request, models.memory, config, detect())
    video = Job(request, plan, OutputOptions(tmp_path / "a.mp4")).videos[0]
    monkeypatch.setattr(module, "RankGroup", FakeRanks(clock))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    Group(config, plan).denoise(video, None)
    video.add_time("denoise_s", clock[0])  # as whoever asks for it does
    told = {name: video.timings[name] for name in ("load_s", "prepare_s", "denoise_s")}
    assert told == {"load_s": 8.0, "prepare_s": 2.0, "denoise_s": 3.0}
