"""`WanVideoToVideoPipeline` without diffusers' beside it: what is refused, what no step keeps, how it is planned."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

import wanduet
from wanduet.doors.python.parts import PipelineBusyError

CALL: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "latent"}
VIDEO = [Image.new("RGB", (32, 32)) for _ in range(5)]
for left, image in enumerate(VIDEO):
    image.paste("red", (left, 8, left + 12, 20))
FLOATS = np.zeros((5, 32, 32, 3), dtype=np.float32)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> "wanduet.WanVideoToVideoPipeline":
    folder = tmp_path_factory.mktemp("data")
    return wanduet.WanVideoToVideoPipeline.from_pretrained("miniature", data_dir=folder, devices="cpu")


@pytest.fixture
def pipe(loaded) -> "wanduet.WanVideoToVideoPipeline":
    """Of its own state, with what is loaded shared."""
    pipe = wanduet.WanVideoToVideoPipeline.from_pipe(loaded)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, video: Any = VIDEO, **call: Any) -> torch.Tensor:
    return pipe(video, "a red circle", generator=torch.Generator().manual_seed(1), **(CALL | call)).frames


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"video": Image.new("RGB", (32, 32))}, "picture"), ({"video": FLOATS[0]}, "picture"),
        ({"video": torch.zeros(3, 32, 32)}, "picture"), ({"video": "clip.mp4"}, "not str"),
        ({"video": tuple(VIDEO)}, "not tuple"), ({"video": []}, "no frames"), ({"video": ["a.png"]}, "cannot be read"),
        ({"video": FLOATS[..., :1]}, "3 colour channels"), ({"video": np.uint8(FLOATS + 200)}, r"0\.\.1"),
        ({"video": FLOATS * float("nan")}, r"0\.\.1"), ({"video": [FLOATS, FLOATS[:1]]}, "cannot be read"),
        ({"video": [VIDEO] * 3, "prompt": ["a", "b"]}, "3 videos were given for 2 prompts"),
        ({"video": [VIDEO] * 2, "num_videos_per_prompt": 2}, "2 videos were given for 1 prompts"),
        ({"video": None}, "video or latents"), ({"latents": torch.zeros(1, 16, 2, 4, 4)}, "not both"),
        ({"strength": -0.1}, "strength"), ({"strength": 1.1}, "strength"), ({"strength": "0.5"}, "strength"),
        ({"strength": float("nan")}, "strength"), ({"timesteps": [900, 500]}, "timesteps"), ({"height": 40}, "16"),
        ({"height": None}, "height"), ({"attention_kwargs": {"mask": 1}}, "attention_kwargs"),
        ({"prompt": None}, "prompt"), ({"output_type": "jpg"}, "output_type"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"), ({"generator": [torch.Generator()] * 2}, "2 gen"),
    ],
)  # fmt: skip
def test_what_is_not_supported_raises(pipe, call, says) -> None:
    with pytest.raises(ValueError, match=says):
        pipe(**({"video": VIDEO, "prompt": "a"} | CALL | call))


def test_no_timesteps_are_refused(pipe) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="empty"):
        latents(pipe, timesteps=[])


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_without_a_step_the_result_is_the_input(pipe, strength) -> None:
    seen: list[int] = []
    frames = latents(pipe, strength=strength, output_type="np", progress=lambda done, _: seen.append(done))[0]
    assert seen == []
    assert pipe.num_timesteps == 0
    assert np.abs(frames - np.stack(VIDEO) / 255.0).mean() < 0.05


def test_less_strength_stays_closer_to_the_input(pipe) -> None:
    source = latents(pipe, strength=0.0)
    far = [(latents(pipe, strength=strength) - source).square().mean() for strength in (0.4, 1.0)]
    assert far[0] < far[1]


def test_the_plan_counts_the_encode(loaded) -> None:
    text = wanduet.WanPipeline.from_pipe(loaded)
    phases = []
    for each in (text, loaded):
        (device,) = each.plan(64, 64, 17).prediction.devices
        phases.append(device.phases)
    assert phases[0]["encode"] < phases[1]["encode"]
    assert {**phases[1], "encode": 0} == {**phases[0], "encode": 0}


def test_a_callback_cannot_call_a_pipeline_that_shares_its_models(pipe) -> None:
    text = wanduet.WanPipeline.from_pipe(pipe)

    def callback(_pipe, _step, _timestep, _tensors) -> dict[str, Any]:
        with pytest.raises(PipelineBusyError, match="callback"):
            text("a", num_frames=5, **CALL)
        return {}

    latents(pipe, callback_on_step_end=callback)


def test_names_that_are_not_here_say_what_takes_their_place(pipe) -> None:
    for name, says in (("transformer_2", "Wan2.1"), ("get_timesteps", "strength="), ("unet", "pipe.transformer")):
        with pytest.raises(AttributeError, match=rf"WanVideoToVideoPipeline has no .*{name}.*{says}"):
            getattr(pipe, name)
