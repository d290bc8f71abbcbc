"""Guidance in an interval and the modes of guidance through the engine: forwards, the record, resuming, two ranks."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from wanduet.config import EngineConfig
from wanduet.engine.job import Job, OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.errors import CancelledError
from wanduet.media.latents import load_latents
from wanduet.media.provenance import summary
from wanduet.models.dit.model import WanTransformer
from wanduet.request import GenerationRequest
from wanduet.sampling.denoise import StepInfo

FIELDS = {
    "prompt": "a red circle moving left on a black background",
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "num_inference_steps": 14,
    "seed": 3,
}
INTERVAL = {"guidance_interval": "0.2-0.6"}  # of 14 steps those from the fourth to the ninth
Run = Callable[..., Job]


@pytest.fixture(scope="module")
def engine(config: EngineConfig) -> Iterator[Engine]:
    with Engine(replace(config, devices="cpu", checkpoint_seconds=0.0)) as one:
        yield one


@pytest.fixture(scope="module")
def ranks(config: EngineConfig) -> Iterator[Engine]:
    with Engine(replace(config, devices="cpu,cpu", strategy="parallel", checkpoint_seconds=0.0)) as one:
        yield one


@pytest.fixture
def run(engine: Engine, tmp_path: Path) -> Run:
    """Run a job; `after`: cancel it after so many steps."""

    def whole(
        name: str = "a", by: Engine = engine, after: int | None = None, resume: bool = False, **changes: Any
    ) -> Job:
        def watch(info: StepInfo) -> None:
            if info.step + 1 == after:
                jobs[0].cancel()

        output = OutputOptions(tmp_path / f"{name}.mkv", "ffv1", save_latents=True, resume=resume)
        jobs: list[Job] = []
        jobs.append(by.submit(GenerationRequest(**(FIELDS | changes)), output, watch=watch))
        jobs[0].result(120)
        return jobs[0]

    return whole


def latents(job: Job) -> torch.Tensor:
    return load_latents(job.result().videos[0].latents_path)[0]


def made(job: Job) -> Any:
    return job.result().videos[0].provenance


def test_each_step_has_the_forwards_of_its_guidance(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards: list[int] = []
    forward = WanTransformer.forward_cfg

    def spy(self: WanTransformer, *given: Any) -> Any:
        forwards.append(len(given[2]))
        return forward(self, *given)

    run("first", num_inference_steps=1)  # the self-test of the weights
    monkeypatch.setattr(WanTransformer, "forward_cfg", spy)
    job = run("interval", **INTERVAL)
    assert forwards == [1] * 3 + [2] * 6 + [1] * 5
    assert job.plan.prediction.forwards.count == made(job)["forwards"] == 20
    assert made(job)["request"]["guidance_interval"] == "0.2-0.6"
    assert "guidance in 0.2-0.6 of the steps" in summary(made(job))
    forwards.clear()
    job = run("zero", guidance_mode="cfg-zero", num_inference_steps=13)
    assert forwards == [2] * 12, "4 % of the steps are left out"
    assert "forwards" not in made(job), "nothing is approximated"
    assert made(job)["request"]["guidance_mode"] == "cfg-zero"
    assert "guidance_mode" not in made(run("first", num_inference_steps=1))["request"]


@pytest.mark.parametrize(
    "changes",
    [{"guidance_mode": "apg"}, INTERVAL | {"guidance_mode": "apg", "step_cache": "easycache:0.4"}],
    ids=str,
)
def test_an_interrupted_job_goes_on_bit_for_bit(run: Run, changes: dict[str, Any]) -> None:
    whole = run("whole", **changes)
    with pytest.raises(CancelledError):
        run("cut", after=7, **changes)
    assert torch.equal(latents(run("cut", resume=True, **changes)), latents(whole))
    assert not torch.equal(latents(whole), latents(run("exact")))


def test_ranks_make_what_one_device_makes(run: Run, ranks: Engine) -> None:
    """Each rank has a prompt in guided steps, and in the others, before and after them, a part of the sequence."""
    for mode in ("apg", "cfg-zero"):
        single, shared = (
            run(f"{mode} {name}", *by, guidance_mode=mode, **INTERVAL) for name, *by in (("a",), ("b", ranks))
        )
        assert shared.plan.group.layout.cfg == 2
        assert torch.allclose(latents(shared), latents(single), atol=2e-5)
    with pytest.raises(CancelledError):
        run("cut", ranks, after=5, guidance_mode="cfg-zero", **INTERVAL)
    again = run("cut", ranks, resume=True, guidance_mode="cfg-zero", **INTERVAL)
    assert torch.equal(latents(again), latents(shared))
