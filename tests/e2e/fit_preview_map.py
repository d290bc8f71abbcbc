"""Fit the linear map from the miniature's latents to colours: `python tests/e2e/fit_preview_map.py`.

Prints the table for `src/wanduet/jobs/preview_maps.py`, and how much of the colours' variance it explains on
clips that it was not fitted to.
"""

import torch
from torch import Tensor

from wanduet.jobs.preview_maps import load_encoder
from wanduet.media.preview import LatentToRGB, fit_latent_to_rgb
from wanduet.miniature.world import render, sample_clips
from wanduet.weights.hub import open_model

SIZE = 64


def pairs(count: int, seed: int, num_frames: int = 9) -> list[tuple[Tensor, Tensor]]:
    """Latents and frames in 0 to 1 of clips of the miniature's world."""
    generator = torch.Generator().manual_seed(seed)
    vae = load_encoder(open_model("miniature"))
    clips = render(sample_clips(count, generator), num_frames, SIZE)
    with torch.no_grad():
        return [(vae.encode(clip[None])[0], (clip + 1) / 2) for clip in clips]


def explained(colours: LatentToRGB, clips: list[tuple[Tensor, Tensor]]) -> float:
    """Share of the variance of the frames, at the latents' resolution, that the map explains."""
    wanted, got = [], []
    for latents, frames in clips:
        small = torch.nn.functional.avg_pool2d(frames, 8)
        groups = torch.cat([small[:, :1], small[:, 1:].unflatten(1, (-1, 4)).mean(2)], dim=1)
        wanted.append(groups.permute(1, 2, 3, 0).flatten(0, 2))
        got.append(torch.from_numpy(colours(latents)).float().flatten(0, 2) / 255)
    want = torch.cat(wanted)
    return 1 - float((torch.cat(got) - want).square().sum() / (want - want.mean(0)).square().sum())


if __name__ == "__main__":
    fitted = fit_latent_to_rgb(pairs(256, seed=0))
    for row in (*fitted.matrix.tolist(), fitted.bias.tolist()):
        print("        (" + ", ".join(f"{value:.4f}" for value in row) + "),")
    print(f"explained: {explained(fitted, pairs(64, seed=1)):.3f}")
