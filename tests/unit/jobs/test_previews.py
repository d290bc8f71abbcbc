"""Previews: the map from latents to colours is learned, the clean video is foreseen, nothing ever raises."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from wanduet.jobs.preview_decoders import DecodedPictures
from wanduet.jobs.preview_maps import ColourMaps, latent_sized, load_encoder, small_frames
from wanduet.jobs.previews import Previews, foresee, moving_picture
from wanduet.media.video import write_video
from wanduet.miniature.world import render, sample_clips
from wanduet.request import GenerationRequest
from wanduet.weights.hub import open_model


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
        found = foresee(steps[i - 1 : i + 1], steps[i + 1].sigma)
        assert found is not None
        torch.testing.assert_close(found, clean, atol=1e-4, rtol=1e-4)
    assert foresee(steps[:1], 0.9) is None
    assert foresee([steps[0], steps[2]], 0.4) is None


def make_video(folder: Path, colours: list[tuple[int, int, int]]) -> tuple[Tensor, Path]:
    """Latents whose first three channels are the colours of four bars, and the video that they stand for."""
    bars = np.repeat(np.array(colours, np.uint8), 16, axis=0)  # [64, 3]
    frames = np.broadcast_to(bars[None, None], (9, 32, 64, 3)).copy()
    video = folder / "video.mp4"
    write_video([frames], video, fps=16, quality=95)
    latents = torch.zeros(16, 3, 4, 8)
    latents[:3] = torch.from_numpy(frames[:3, ::8, ::8].astype(np.float32) / 127.5 - 1).permute(3, 0, 1, 2)
    return latents, video


BARS = [(220, 30, 30), (30, 200, 40), (40, 60, 230), (128, 128, 128)]


def test_a_map_is_learned_from_finished_videos(tmp_path: Path) -> None:
    maps = ColourMaps(tmp_path / "previews", "some/model", 16)
    assert maps.load() is None
    latents, video = make_video(tmp_path, BARS)
    maps.learn(latents, video)
    found = ColourMaps(tmp_path / "previews", "some/model", 16).load()
    assert found is not None
    got = found(latents).astype(int)
    want = (small_frames(video) * 255).round().astype(int)
    assert got.shape == want.shape == (3, 4, 8, 3)
    assert np.abs(got - want).mean() < 4
    assert ColourMaps(tmp_path / "previews", "another/model", 16).load() is None


def test_a_damaged_map_is_no_map(tmp_path: Path) -> None:
    maps = ColourMaps(tmp_path, "m", 16)
    latents, video = make_video(tmp_path, BARS)
    for damage in (b"", b"[]", b'{"videos": 1, "gram": [1], "target": []}'):
        (tmp_path / "m.json").write_bytes(damage)
        assert maps.load() is None
    maps.learn(latents, video)
    assert maps.load() is not None


def test_a_denoise_leaves_pictures_and_teaches_the_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanduet.jobs.previews.SHORTEST_PAUSE", 0.0)
    monkeypatch.setattr("wanduet.jobs.previews.SHARE", 1e9)
    latents, video = make_video(tmp_path, BARS)
    picture = tmp_path / "work" / "preview.webp"
    for turn in (1, 2):
        previews = Previews(picture, ColourMaps(tmp_path, "m", 16), GenerationRequest(prompt="x", fps=16))
        seen = []
        for step in euler(latents[None], torch.randn(1, *latents.shape), [1.0, 0.8, 0.5, 0.2, 0.0]):
            before = step.latents.clone()
            previews(step)
            assert torch.equal(step.latents, before)
            seen.append(picture.exists())
        previews.learn(video)
        assert seen == ([False] * 4 if turn == 1 else [False, False, True, True])
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
    latents, video = make_video(tmp_path, BARS)
    (tmp_path / "file").write_bytes(b"")
    maps = ColourMaps(tmp_path / "file", "m", 16)  # a folder that cannot be made
    previews = Previews(tmp_path / "file" / "preview.webp", maps, GenerationRequest(prompt="x"))
    for step in euler(latents[None], torch.randn(1, *latents.shape), [1.0, 0.5, 0.0]):
        previews(step)
    previews.learn(video)


def test_a_map_is_fitted_to_the_models_own_encoder(tmp_path: Path) -> None:
    """With the miniature under another name: its fitted map does nearly as well as the one that is built in."""
    folder = open_model("miniature")
    maps = ColourMaps(tmp_path, "unknown/model", 16)
    thread = maps.fit_beside(folder)
    assert thread is not None
    assert maps.fit_beside(folder) is None, "one at a time"
    thread.join(120)
    fitted, built_in = maps.load(), ColourMaps(tmp_path, "miniature", 16).load()
    assert fitted is not None
    assert built_in is not None
    vae = load_encoder(folder)
    clips = render(sample_clips(8, torch.Generator().manual_seed(7)), 5, 64)
    colours = np.stack([latent_sized((clip + 1) / 2) for clip in clips])
    latents = [vae.encode(clip[None])[0] for clip in clips]
    ours, best = (
        np.square(np.stack([known(z) for z in latents]) / 255 - colours).mean() for known in (fitted, built_in)
    )
    assert ours < 2 * best
    assert ours < 0.4 * colours.var((0, 1, 2, 3)).mean()
    assert maps.fit_beside(folder) is None, "once"


def test_a_decoder_that_fails_leaves_the_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanduet.jobs.previews.SHORTEST_PAUSE", 0.0)
    monkeypatch.setattr("wanduet.jobs.previews.SHARE", 1e9)
    latents, video = make_video(tmp_path, BARS)
    maps = ColourMaps(tmp_path, "m", 16)
    maps.learn(latents, video)
    damaged = tmp_path / "taew2_1.safetensors"
    damaged.write_bytes(b"no weights")
    decoder = DecodedPictures(damaged, (0.0,) * 16, (1.0,) * 16)
    picture = tmp_path / "preview.webp"
    previews = Previews(picture, maps, GenerationRequest(prompt="x", fps=16), decoder)
    for step in euler(latents[None], torch.randn(1, *latents.shape), [1.0, 0.5, 0.0]):
        previews(step)
    with Image.open(picture) as image:
        assert image.size == (8, 4)
