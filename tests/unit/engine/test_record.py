"""What a checkpoint, latents or a video belong to: all that has a say in them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wanduet.config import EngineConfig
from wanduet.engine.job import Job, OutputOptions
from wanduet.engine.record import made_alike, provenance_of, video_digest
from wanduet.planning.hardware import detect
from wanduet.planning.planner import make_plan
from wanduet.request import GenerationRequest
from wanduet.runtime.models import Models

SMALL = {"prompt": "a red circle", "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 6, "seed": 3}

CHANGES = {
    "prompt": {"prompt": "a blue square"},
    "seed": {"seed": 4},
    "steps": {"num_inference_steps": 7},
    "guidance": {"guidance_scale": 2.0},
    "shift": {"flow_shift": 4.0},
    "sampler": {"sampler": "euler"},
    "size": {"height": 48},
    "frames": {"num_frames": 9},
    "step cache": {"step_cache": "easycache", "num_inference_steps": 12},
    "guidance gate": {"guidance_gate": 0.5},
    "sparse attention": {"sparse": 0.5, "num_frames": 17},
    "low resolution": {"low_res_first": True, "height": 96, "width": 96},
    "transformer's precision": {"transformer_dtype": "bfloat16"},
    "weights' format": {"weights": "q8"},
    "text encoder's precision": {"text_encoder_dtype": "bfloat16"},
    "approximate attention": {"attention": "sageattention"},
    "model": {"model": "random:1.3b"},
    "callback": {},
}


def digest_of(config: EngineConfig, on_step: Any = None, **changes: Any) -> str:
    models, job = job_of(config, on_step, **changes)
    return video_digest(models, job.videos[0])


def job_of(config: EngineConfig, on_step: Any = None, **changes: Any) -> tuple[Models, Job]:
    settings = {k: v for k, v in changes.items() if k in EngineConfig.__dataclass_fields__}
    request_changes = {k: v for k, v in changes.items() if k not in settings}
    config = replace(config, **settings)
    models = Models(config)
    request = GenerationRequest(**(SMALL | request_changes)).resolve(models.spec)
    plan = make_plan(request, models.memory, config, detect())
    return models, Job(request, plan, OutputOptions(Path("x.mkv")), None, on_step)


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_the_latents_is_another_denoise(config, change) -> None:
    config = replace(config, text_encoder_dtype="float32")
    on_step = (lambda _: None) if change == "callback" else None
    assert digest_of(config, on_step, **CHANGES[change]) != digest_of(config)


def test_the_sampler_and_its_timesteps_are_part_of_a_denoise(config) -> None:
    lists, samplers = ((900, 500), (900, 400)), ("euler", "renoise")
    made = {
        digest_of(config, sampler=name, timesteps=values, num_inference_steps=2)
        for name in samplers
        for values in lists
    }
    assert len(made) == 4


@pytest.mark.parametrize(
    "changes", [{"fps": 8}, {"num_videos_per_prompt": 3}, {"vae_dtype": "bfloat16"}, {"tf32": False}, {"devices": "vae=cpu,transformer=cpu"}],
    ids=["fps", "more videos", "vae", "tf32", "placed"],
)  # fmt: skip
def test_what_does_not_change_the_latents_goes_on(config, changes) -> None:
    assert digest_of(config, **changes) == digest_of(config)


def test_each_of_a_jobs_videos_is_another_denoise(config) -> None:
    models, job = job_of(config, num_videos_per_prompt=3)
    assert len({video_digest(models, video) for video in job.videos}) == 3


def test_a_format_that_is_the_transformer_s_dtype_changes_nothing(config) -> None:
    same = [digest_of(config, transformer_dtype="bfloat16", weights=name) for name in ("auto", "bf16")]
    assert same[0] == same[1] != digest_of(config, transformer_dtype="float32", weights="bf16")


@pytest.mark.parametrize(
    "changes",
    [
        {"vae_dtype": "bfloat16"},
        {"tf32": False},
        {"transformer_dtype": "bfloat16"},
        {"weights": "q8"},
        {"fps": 8},
        {"seed": 4},
    ],
    ids=["vae", "tf32", "transformer", "weights", "fps", "seed"],
)
def test_a_video_of_other_settings_is_another_video(config, changes) -> None:
    (models, job), (others, other) = job_of(config), job_of(config, **changes)
    wanted = provenance_of(models, job.videos[0])
    assert made_alike(provenance_of(models, job.videos[0]), wanted)
    assert not made_alike(provenance_of(others, other.videos[0]), wanted)
    assert not made_alike({}, wanted)
