"""Previews: what is written after each step, and that no error reaches the denoise."""

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from wanduet.previews.colour_maps import LatentToRGB
from wanduet.previews.decoders import DecodedPictures
from wanduet.previews.watch import Previews, moving_picture, predict_clean
from wanduet.request import GenerationRequest


@dataclass
class Step:
    step: int
    num_steps: int
    sigma: float
    latents: Tensor


def euler(clean: Tensor, noise: Tensor, sigmas: list[float]) -> list[Step]:
    """What a perfect model's denoise looks like from outside."""
    steps = len(sigmas) - 1
    return [Step(i, steps, sigmas[i], (1 - sigmas[i + 1]) * clean + sigmas[i + 1] * noise) for i in range(steps)]


def test_the_end_of_the_line_is_the_clean_video() -> None:
    clean, noise = torch.randn(1, 16, 3, 4, 4), torch.randn(1, 16, 3, 4, 4)
    steps = euler(clean, noise, [1.0, 0.9, 0.7, 0.4, 0.0])
    for i in (1, 2):
        found = predict_clean(steps[i - 1 : i + 1], steps[i + 1].sigma)
        assert found is not None
        torch.testing.assert_close(found, clean, atol=1e-4, rtol=1e-4)
    assert predict_clean(steps[:1], 0.9) is None
    assert predict_clean([steps[0], steps[2]], 0.4) is None
    enlarged = replace(steps[1], latents=steps[1].latents.repeat(1, 1, 1, 2, 2))
    assert predict_clean([steps[0], enlarged], 0.4) is None


BARS = [(220, 30, 30), (30, 200, 40), (40, 60, 230), (128, 128, 128)]
FIRST_THREE = LatentToRGB(torch.eye(16, 3) / 2, torch.full((3,), 0.5))


def bars() -> Tensor:
    """Latents `[16, 3, 4, 8]` whose first three channels are the colours of four bars, in -1 to 1."""
    latents = torch.zeros(16, 3, 4, 8)
    latents[:3] = (torch.tensor(BARS) / 127.5 - 1).repeat_interleave(2, 0).T[:, None, None]
    return latents


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanduet.previews.watch.MIN_PAUSE", 0.0)
    monkeypatch.setattr("wanduet.previews.watch.TIME_SHARE", 1e9)


@pytest.mark.usefixtures("no_pauses")
def test_a_denoise_leaves_pictures_where_the_colours_are_known(tmp_path: Path) -> None:
    latents = bars()
    picture = tmp_path / "work" / "preview.webp"
    for colours, expected in ((None, [False] * 4), (FIRST_THREE, [False, False, True, True])):
        previews = Previews(picture, colours, GenerationRequest(prompt="x", fps=16))
        seen = []
        for step in euler(latents[None], torch.randn(1, *latents.shape), [1.0, 0.8, 0.5, 0.2, 0.0]):
            before = step.latents.clone()
            previews(step)
            assert torch.equal(step.latents, before)
            seen.append(picture.exists())
        assert seen == expected
    with Image.open(io.BytesIO(picture.read_bytes())) as image:
        assert (image.format, image.n_frames, image.size) == ("WEBP", 1, (8, 4))  # equal frames are stored once
        colour = np.asarray(image.convert("RGB"))[0, 0]
    assert np.abs(colour.astype(int) - BARS[0]).max() < 40


def test_pictures_are_small() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (81, 135, 240, 3), np.uint8)
    with Image.open(io.BytesIO(moving_picture(frames, 4.0))) as image:
        assert image.n_frames <= 24
        assert max(image.size) == 160


def test_nothing_that_goes_wrong_reaches_the_denoise(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")  # where a folder would have to be made
    previews = Previews(tmp_path / "file" / "preview.webp", FIRST_THREE, GenerationRequest(prompt="x"))
    for step in euler(bars()[None], torch.randn(1, 16, 3, 4, 8), [1.0, 0.5, 0.0]):
        previews(step)


@pytest.mark.usefixtures("no_pauses")
def test_a_decoder_that_fails_leaves_the_map(tmp_path: Path) -> None:
    damaged = tmp_path / "taew2_1.safetensors"
    damaged.write_bytes(b"no weights")
    decoder = DecodedPictures(damaged, (0.0,) * 16, (1.0,) * 16)
    picture = tmp_path / "preview.webp"
    previews = Previews(picture, FIRST_THREE, GenerationRequest(prompt="x", fps=16), decoder)
    for step in euler(bars()[None], torch.randn(1, 16, 3, 4, 8), [1.0, 0.5, 0.0]):
        previews(step)
    with Image.open(picture) as image:
        assert image.size == (8, 4)
