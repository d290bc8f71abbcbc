"""A video's stages one by one give what the engine's job gives."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wanduet import Engine, EngineConfig, GenerationRequest, OutputOptions
from wanduet.doors.python.stages import StageHooks, VideoStages
from wanduet.errors import CancelledError, InvalidRequestError
from wanduet.media.latents import load_latents
from wanduet.runtime.context import Event

PROMPT = "a red circle moving left on a black background"
SMALL = GenerationRequest(
    prompt=PROMPT, height=32, width=32, num_frames=5, num_inference_steps=3, guidance_scale=3, seed=7
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return EngineConfig(
        model="miniature", devices="cpu", data_dir=tmp_path_factory.mktemp("data"), checkpoint_seconds=0
    )


@pytest.fixture(scope="module")
def stages(config: EngineConfig) -> Iterator[VideoStages]:
    found = VideoStages(config)
    yield found
    found.close()


@pytest.fixture(scope="module")
def latents(stages: VideoStages) -> torch.Tensor:
    return stages.denoise(SMALL, stages.encode_prompt(PROMPT))


def test_the_stages_give_the_latents_of_a_job(config: EngineConfig, latents: torch.Tensor, tmp_path: Path) -> None:
    with Engine(config) as engine:
        result = engine.submit(SMALL, OutputOptions(tmp_path / "a.mp4", save_latents=True)).result(timeout=120)
    path = result.videos[0].latents_path
    assert path is not None
    # A job encodes both prompts at once, which differs in the last bits.
    assert torch.allclose(load_latents(path)[0], latents, atol=1e-3)


def test_a_decode_and_an_encode_have_the_sizes_of_the_latents(stages: VideoStages, latents: torch.Tensor) -> None:
    frames = stages.decode(latents)
    assert frames.shape == (5, 32, 32, 3)
    assert frames.dtype == np.uint8
    encoded = stages.encode_frames(frames)
    assert torch.allclose(encoded, stages.encode_frames((frames / 255).astype(np.float32)), atol=1e-4)
    assert stages.decode(encoded).astype(float) == pytest.approx(frames.astype(float), abs=60)


def test_scaled_latents_are_normalised_again(stages: VideoStages, latents: torch.Tensor) -> None:
    scaled = stages.scaled(latents[None])
    assert not torch.allclose(scaled[0], latents, atol=0.1)
    assert torch.allclose(stages.normalised(scaled)[0], latents, atol=1e-5)


def test_a_cancelled_denoise_goes_on_where_it_was(stages: VideoStages) -> None:
    request = SMALL.model_copy(update={"seed": 8})
    prompt = stages.encode_prompt(PROMPT)
    done: list[int] = []

    def on_event(event: Event) -> None:
        if event.phase == "denoise":
            done.append(event.done)

    with pytest.raises(CancelledError):
        stages.denoise(request, prompt, hooks=StageHooks(on_event, lambda: 1 in done))
    done.clear()
    resumed = stages.denoise(request, prompt, hooks=StageHooks(on_event))
    assert done == [1, 2, 3]
    done.clear()
    assert torch.equal(stages.denoise(request, prompt, hooks=StageHooks(on_event)), resumed)
    assert done == [0, 1, 2, 3]  # what is finished is not kept


def test_strength_says_how_much_of_latents_is_made_anew(stages: VideoStages, latents: torch.Tensor) -> None:
    prompt = stages.encode_prompt("a blue star spinning on a gray background")
    kept = stages.denoise(SMALL.model_copy(update={"strength": 0.0}), prompt, source=latents)
    assert torch.allclose(kept, latents, atol=1e-5)
    changed = stages.denoise(SMALL.model_copy(update={"strength": 0.7}), prompt, source=latents)
    assert not torch.allclose(changed, latents, atol=0.1)
    anew = stages.denoise(SMALL.model_copy(update={"strength": 1.0}), prompt, source=latents)
    assert torch.equal(anew, stages.denoise(SMALL, prompt))
    assert not torch.allclose(anew, changed, atol=0.1)


def test_previews_are_pictures_of_the_video(stages: VideoStages) -> None:
    seen: list[bytes] = []
    stages.denoise(SMALL, stages.encode_prompt(PROMPT), hooks=StageHooks(on_preview=seen.append))
    assert Image.open(io.BytesIO(seen[-1])).format == "WEBP"


def test_what_the_model_cannot_make_is_refused(stages: VideoStages, latents: torch.Tensor) -> None:
    with pytest.raises(InvalidRequestError, match="multiple of 16"):
        stages.encode_frames(np.zeros((5, 40, 32, 3), np.uint8))
    with pytest.raises(InvalidRequestError, match=r"4n\+1"):
        stages.encode_frames(np.zeros((4, 32, 32, 3), np.uint8))
    with pytest.raises(InvalidRequestError, match="latents"):
        stages.decode(latents[:8])
    with pytest.raises(InvalidRequestError, match="this size"):
        stages.denoise(SMALL.model_copy(update={"width": 48}), stages.encode_prompt("x"), source=latents)
