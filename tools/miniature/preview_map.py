"""Fit the linear map from the miniature's latents to colours: `python -m tools.miniature.preview_map`.

Writes it into the miniature's folder, with its hash, and prints how much of the colours' variance it explains on clips
that it was not fitted to.
"""

import json
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from tools.miniature.world import render, sample_clips
from wanduet.models.vae.model import WanVAE
from wanduet.previews.colour_maps import COLOURS_FILE, LatentToRGB, find_colours
from wanduet.weights.diffusers import ModelFolder
from wanduet.weights.hub import open_model
from wanduet.weights.manifest import write_manifest

SIZE = 64


def load_vae(folder: ModelFolder) -> WanVAE:
    """The miniature's VAE on the CPU, in float32."""
    vae = WanVAE(folder.spec.vae).eval().requires_grad_(False)
    folder.vae.load_into({name: parameter.data for name, parameter in vae.named_parameters()})
    return vae


def pairs(vae: WanVAE, count: int, seed: int, num_frames: int = 9) -> list[tuple[Tensor, Tensor]]:
    """Latents `[C, T, h, w]` of clips of the miniature's world, and their colours `[3, T, h, w]` in 0 to 1.

    The first latent frame stands for one frame, every later one for the mean of four.
    """
    clips = render(sample_clips(count, torch.Generator().manual_seed(seed)), num_frames, SIZE)
    found = []
    for clip in clips:
        small = avg_pool2d((clip + 1) / 2, 8)
        colours = torch.cat([small[:, :1], small[:, 1:].unflatten(1, (-1, 4)).mean(2)], dim=1)
        found.append((vae.encode(clip[None])[0], colours))
    return found


def fit(found: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The map `[C + 1, 3]` with the least squared error, its bias last."""
    x = torch.cat([latents.double().flatten(1).T for latents, _ in found])
    colours = torch.cat([colours.double().flatten(1).T for _, colours in found])
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    return torch.linalg.lstsq(x, colours, driver="gelsd").solution


def explained(colours: LatentToRGB, found: list[tuple[Tensor, Tensor]]) -> float:
    """Share of the variance of the colours that the map explains."""
    want = torch.cat([colours.flatten(1).T for _, colours in found])
    got = torch.cat([torch.from_numpy(colours(latents)).float().flatten(0, 2) / 255 for latents, _ in found])
    return 1 - float((got - want).square().sum() / (want - want.mean(0)).square().sum())


if __name__ == "__main__":
    folder = open_model("miniature")
    clips = partial(pairs, load_vae(folder))
    rows = (json.dumps([round(value, 4) for value in row]) for row in fit(clips(256, seed=0)).tolist())
    (folder.path / COLOURS_FILE).write_text("[\n  " + ",\n  ".join(rows) + "\n]\n")
    write_manifest(folder.path)
    fitted = find_colours(folder.spec, folder.path)
    assert fitted is not None
    print(f"explained: {explained(fitted, clips(64, seed=1)):.3f}")
