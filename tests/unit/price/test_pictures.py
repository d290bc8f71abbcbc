"""The measures of videos against values that the packages themselves give for the same frames."""

import math

import pytest
import torch
from torch import Tensor

from wanduet.price import jod, st_lpips
from wanduet.price.compare import Made, Measures, missing
from wanduet.price.pictures import psnr, ssim

CPU = torch.device("cpu")
# Rows, columns, frames, frames a second: with odd sides, small bands that are not blurred, and a single picture.
JODS = {
    (50, 70, 3, 24): 9.199368,
    (16, 48, 3, 24): 8.132831,
    (240, 320, 1, 24): 9.602629,
    (96, 64, 1, 24): 9.535100,
}
DISTANCES = {(96, 64, 1): 0.01404006}


def clip(rows: int, columns: int, frames: int, phase: float) -> Tensor:
    """Moving waves in three colours, `[T, H, W, 3]` uint8."""
    t, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (frames, rows, columns)), indexing="ij")
    waves = [torch.sin(x / 7 + t / 3 + phase * c + c) * torch.cos(y / (5 + c) + phase) for c in range(3)]
    return (127.5 + 100 * torch.stack(waves, -1)).round().clamp(0, 255).to(torch.uint8)


def test_psnr() -> None:
    video = torch.full((2, 16, 16, 3), 100, dtype=torch.uint8)
    other = video.clone()
    other[0] += 10
    assert psnr(other, video) == pytest.approx(10 * math.log10(255**2 / 50), abs=1e-4)
    assert psnr(video, video) == 100.0


def test_ssim_is_that_of_pytorch_msssim() -> None:
    assert ssim(clip(64, 64, 2, 0.15), clip(64, 64, 2, 0.0)) == pytest.approx(0.95348358, abs=1e-5)
    assert ssim(clip(16, 32, 1, 0.0), clip(16, 32, 1, 0.0)) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.skipif(st_lpips.weights_file() is None, reason="the weights of stlpips_pytorch are not installed")
def test_st_lpips_is_that_of_its_package() -> None:
    path = st_lpips.weights_file()
    assert path is not None
    network = st_lpips.STLPIPS(path, CPU)
    for size, expected in DISTANCES.items():
        assert network(clip(*size, 0.15), clip(*size, 0.0)) == pytest.approx(expected, rel=1e-4)
    smallest = (st_lpips.SMALLEST, st_lpips.SMALLEST, 1)
    assert network(clip(*smallest, 0.0), clip(*smallest, 0.0)) == 0.0


@pytest.mark.skipif(jod.data_folder() is None, reason="the parameters of cvvdp are not installed")
def test_jod_is_that_of_its_package() -> None:
    folder = jod.data_folder()
    assert folder is not None
    metric = jod.ColorVideoVDP(folder, CPU)
    for (*size, fps), expected in JODS.items():
        assert metric(clip(*size, 0.15), clip(*size, 0.0), fps) == pytest.approx(expected, abs=2e-5)
    assert metric(clip(32, 32, 2, 0.0), clip(32, 32, 2, 0.0), 16) == 10.0


def test_without_the_packages_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for one in (st_lpips, jod):
        monkeypatch.setattr(one, "PACKAGE", "a_package_that_is_not_there")
    latents = torch.ones(1, 2, 2, 2)
    exact = Made(latents, clip(16, 32, 1, 0.0), 1.0, 2)
    found = Measures(CPU)(Made(1.1 * latents, clip(16, 32, 1, 0.1), 1.0, 2), exact, 16)
    assert found["latents_error"] == pytest.approx(0.1)
    assert (found["st_lpips"], found["jod"]) == (None, None)
    assert 10 < found["psnr"] < 50
    assert [".[price]" in missing()[0], "cvvdp" in missing()[1]] == [True, True]


@pytest.mark.skipif(st_lpips.weights_file() is None, reason="the weights of stlpips_pytorch are not installed")
def test_frames_that_are_too_small_for_the_network_have_no_distance() -> None:
    made = Made(torch.ones(1, 2, 2, 2), clip(16, 32, 1, 0.0), 1.0, 2)
    assert Measures(CPU)(made, made, 16)["st_lpips"] is None
    assert Measures(CPU)(made, made, 16)["latents_error"] == 0
