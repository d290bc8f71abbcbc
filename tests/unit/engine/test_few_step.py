"""Jobs at given timesteps through the engine: resumed bit for bit, from a video, with warnings."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wanduet.config import EngineConfig
from wanduet.engine.job import Job, OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.errors import CancelledError, InvalidRequestError
from wanduet.media.latents import load_latents
from wanduet.media.read import read_metadata
from wanduet.media.video import VideoSpec, write_video
from wanduet.request import GenerationRequest
from wanduet.sampling.denoise import StepInfo
from wanduet.sampling.noise import initial_noise

LIST = (1000.0, 757.0, 522.0, 200.0)
SMALL = {"prompt": "a red circle", "height": 32, "width": 32, "num_frames": 5, "seed": 3, "timesteps": LIST}
Run = Callable[..., Job]


@pytest.fixture(scope="module")
def engine(config: EngineConfig) -> Iterator[Engine]:
    with Engine(replace(config, checkpoint_seconds=0.0)) as one:
        yield one


@pytest.fixture
def run(engine: Engine, tmp_path: Path) -> Run:
    def whole(name: str = "a", watch: Any = None, resume: bool = False, **changes: Any) -> Job:
        options = OutputOptions(tmp_path / f"{name}.mkv", "ffv1", save_latents=True, resume=resume)
        began.clear()
        made.append(engine.submit(GenerationRequest(**(SMALL | changes)), options, watch=watch))
        began.set()
        made[-1].result(120)
        return made[-1]

    def cancel() -> None:
        assert began.wait(60)
        made[-1].cancel()

    made: list[Job] = []
    began = threading.Event()
    whole.cancel = cancel  # type: ignore[attr-defined]
    return whole


def latents(job: Job) -> torch.Tensor:
    return load_latents(job.result().videos[0].latents_path)[0]


@pytest.mark.parametrize("sampler", ["renoise", "euler"])
def test_an_interrupted_job_resumes_bit_for_bit(run: Run, sampler: str) -> None:
    whole = run("whole", sampler=sampler)

    def stop(info: StepInfo) -> None:
        if info.step == 1:
            run.cancel()  # type: ignore[attr-defined]

    with pytest.raises(CancelledError):
        run("cut", stop, sampler=sampler)
    seen: list[int] = []
    again = run("cut", lambda info: seen.append(info.step), sampler=sampler, resume=True)
    assert seen == [2, 3]
    assert torch.equal(latents(again), latents(whole))
    made = read_metadata(again.video_path(0))["request"]
    assert (made["sampler"], made["timesteps"], made["num_inference_steps"]) == (sampler, list(LIST), 4)


def test_an_input_video_is_made_anew_at_the_last_timesteps(run: Run, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mkv"
    write_video([np.full((5, 32, 32, 3), 90, np.uint8)], clip, VideoSpec(32, 32, codec="ffv1"), {})
    seen: list[StepInfo] = []
    run(watch=seen.append, sampler="renoise", input_video=str(clip), strength=0.5)
    assert [(info.step, info.timestep) for info in seen] == [(2, 522.0), (3, 200.0)]


def test_a_list_below_1000_begins_with_less_noise(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[torch.Tensor] = []
    steps = "wanduet.stages.denoise.run_steps"
    monkeypatch.setattr(steps, lambda guidance, latents, *_, **__: begun.append(latents) or latents)
    job = run(sampler="renoise", timesteps=(640.0, 300.0))
    (start,) = begun
    assert torch.equal(start, initial_noise(tuple(start.shape), job.request.seed) * 0.64)


def test_a_model_of_few_steps_has_no_guidance(
    config: EngineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wanduet.weights.diffusers import ModelFolder

    spec = ModelFolder.spec.func  # type: ignore[attr-defined]  # a cached property
    few = {"sampler": "renoise", "timesteps": LIST, "guidance_scale": 1.0}

    def changed(folder: ModelFolder) -> Any:
        made = spec(folder)
        return replace(made, defaults=replace(made.defaults, **few))

    monkeypatch.setattr(ModelFolder, "spec", property(changed))
    with Engine(config) as engine:
        plain, one = (
            engine.submit(
                GenerationRequest.parse(**(SMALL | {"timesteps": None, "guidance_scale": scale})),
                OutputOptions(tmp_path / f"{scale}.mp4"),
            )
            for scale in (None, 1.0)
        )
        with pytest.raises(InvalidRequestError, match="distilled to run without guidance"):
            engine.submit(
                GenerationRequest.parse(**(SMALL | {"timesteps": None, "guidance_scale": 3.0})), tmp_path / "x.mp4"
            )
    assert (plain.request.sampler, plain.request.timesteps, plain.request.uses_guidance) == ("renoise", LIST, False)
    assert plain.warnings == one.warnings == []
