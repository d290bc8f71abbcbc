"""Previews made by a small decoder (TAEHV) whose weights a user put beside the model: finding, loading, running it."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wanduet.family.spec import ModelSpec
from wanduet.family.wan21 import WAN_1_3B
from wanduet.media.codecs import Frame
from wanduet.meta.init import meta_init
from wanduet.models.vae.preview_decoder import LATENT_CHANNELS, PreviewDecoder
from wanduet.weights.safetensors import TensorFiles

# File names under which the weights are published, and whether they take normalised latents: TAEHV's do, as its
# author's and LightX2V's code show; LightX2V's own take latents as the encoder gives them.
TAKES_NORMALISED = {"taew2_1.safetensors": True, "lighttaew2_1.safetensors": False}
LONGEST_SIDE = 320  # of a preview, in pixels
_DOUBLINGS = 3  # from latents to pixels


@dataclass(frozen=True, slots=True)
class DecodedPictures:
    """Calls the decoder in a file on normalised latents. Loaded at the first call, then kept for later jobs."""

    path: Path
    mean: tuple[float, ...]
    std: tuple[float, ...]
    longest_side: int = LONGEST_SIDE

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> Frame:
        """Latents `[C, T, h, w]` to uint8 frames `[T, H, W, 3]`. Raises WeightsError for a file that does not fit."""
        statistics = None if TAKES_NORMALISED[self.path.name] else (self.mean, self.std)
        decoder = _load(self.path, self.path.stat().st_mtime_ns, str(latents.device), statistics)
        pictures = decoder.pictures(latents, doublings_for(max(latents.shape[2:]), self.longest_side))
        # Copied to the host one picture at a time, to need little device memory.
        frames: Frame = np.stack([p.mul(255).round().byte().permute(1, 2, 0).cpu().numpy() for p in pictures])
        return frames


def find_decoder(spec: ModelSpec, *folders: Path | None) -> DecodedPictures | None:
    """The first decoder in one of the folders or their `vae_approx`; None if there is none.

    None for a model without Wan2.1's own VAE, as the decoder is trained on that one's latents.
    """
    if spec.vae != WAN_1_3B.vae or spec.vae.z_dim != LATENT_CHANNELS:
        return None
    places = [place for folder in folders if folder is not None for place in (folder, folder / "vae_approx")]
    found = next((place / name for place in places for name in TAKES_NORMALISED if (place / name).is_file()), None)
    return None if found is None else DecodedPictures(found, spec.vae.latents_mean, spec.vae.latents_std)


def doublings_for(longest: int, wanted: int = LONGEST_SIDE) -> int:
    """How often to double the size of latents whose longer side is `longest`: at least once, up to `wanted` pixels."""
    return max([n for n in range(1, _DOUBLINGS + 1) if longest * 2**n <= wanted], default=1)


@lru_cache(maxsize=1)
def _load(
    path: Path, changed_ns: int, device: str, statistics: tuple[tuple[float, ...], tuple[float, ...]] | None
) -> PreviewDecoder:
    mean, std = (None, None) if statistics is None else (torch.tensor(values) for values in statistics)
    dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    with meta_init():
        decoder = PreviewDecoder(mean, std).eval().requires_grad_(False)
    decoder = decoder.to(dtype).to_empty(device=device)
    files = TensorFiles("preview decoder", [path])
    targets = {name: parameter.data for name, parameter in decoder.named_parameters()}
    files.load_into(targets, ignore=[name for name in files.tensors if name.startswith("encoder.")])
    return decoder
