"""Linear maps from latents to colours: what they compute, which models have one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d

from tools.miniature.world import render, sample_clips
from wanduet.family.wan21 import WAN_1_3B
from wanduet.models.vae.model import WanVAE
from wanduet.previews.colour_maps import COLOURS_FILE, LatentToRGB, find_colours
from wanduet.weights.hub import open_model


def test_linear_map_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(16, 2, 3, 4, generator=generator)
    matrix, bias = torch.randn(16, 3, generator=generator) / 8, torch.tensor([0.2, 0.5, 0.8])
    picture = LatentToRGB(matrix, bias)(latents.to(torch.bfloat16))
    assert (picture.shape, picture.dtype) == ((2, 3, 4, 3), np.uint8)
    for t, y, x in np.ndindex(2, 3, 4):
        colour = latents[:, t, y, x].to(torch.bfloat16).float() @ matrix + bias
        assert np.abs(picture[t, y, x] - colour.mul(255).clamp(0, 255).numpy()).max() <= 0.51


def test_the_published_map_is_for_wans_vae_alone() -> None:
    colours = find_colours(WAN_1_3B, None)
    assert colours is not None
    pixels = torch.zeros(16, 1, 1, 2)
    pixels[6, 0, 0, 1] = -2.0  # the channel that has most of the brightness, negative
    dark, bright = colours(pixels)[0, 0].astype(int)
    assert dark.tolist() == [104, 116, 85]  # the bias (-0.1835, -0.0868, -0.3360), from -1 to 1 to bytes
    assert (bright - dark > 70).all()
    assert find_colours(replace(WAN_1_3B, vae=replace(WAN_1_3B.vae, base_dim=64)), None) is None


def test_the_miniatures_own_map_explains_the_colours_of_its_world() -> None:
    folder = open_model("miniature")
    colours = find_colours(folder.spec, folder.path)
    assert colours is not None
    vae = WanVAE(folder.spec.vae).eval().requires_grad_(False)
    folder.vae.load_into({name: parameter.data for name, parameter in vae.named_parameters()})
    clips = render(sample_clips(6, torch.Generator().manual_seed(7)), 1, 64)
    wanted = torch.stack([avg_pool2d((clip[:, 0] + 1) / 2, 8).permute(1, 2, 0) for clip in clips])
    got = torch.stack([torch.from_numpy(colours(vae.encode(clip[None])[0])[0]).float() / 255 for clip in clips])
    assert (got - wanted).square().mean() < 0.4 * wanted.var((0, 1, 2)).mean()


@pytest.mark.parametrize("damage", ["", "{}", "[[1, 2], [3]]", "[[1, 2, 3]]", '[["a"]]', "[[1e999, 0, 0]]"])
def test_a_damaged_map_is_no_map(tmp_path: Path, damage: str) -> None:
    spec = open_model("miniature").spec
    assert find_colours(spec, tmp_path) is None
    (tmp_path / COLOURS_FILE).write_text(damage)
    assert find_colours(spec, tmp_path) is None
