"""Linear maps from latents to colours, for previews: Wan2.1's is below, a model with another VAE may bring its own."""

from dataclasses import dataclass
from pathlib import Path

import structlog
import torch
from torch import Tensor

from wanduet.family.spec import ModelSpec
from wanduet.family.wan21 import WAN_1_3B
from wanduet.media.codecs import Frame
from wanduet.untrusted import parse_json, read_file

log = structlog.get_logger(__name__)

COLOURS_FILE = "preview_colours.json"  # [C + 1][3]: red, green, blue (0 to 1) for each channel; the bias last

# Normalised latents to colours in -1 to 1. From ComfyUI, comfy/latent_formats.py, Wan21.latent_rgb_factors and
# latent_rgb_factors_bias, which its latent_preview.py applies to the same normalised latents.
WAN_FACTORS = (
    (-0.1299, -0.1692, 0.2932),
    (0.0671, 0.0406, 0.0442),
    (0.3568, 0.2548, 0.1747),
    (0.0372, 0.2344, 0.1420),
    (0.0313, 0.0189, -0.0328),
    (0.0296, -0.0956, -0.0665),
    (-0.3477, -0.4059, -0.2925),
    (0.0166, 0.1902, 0.1975),
    (-0.0412, 0.0267, -0.1364),
    (-0.1293, 0.0740, 0.1636),
    (0.0680, 0.3019, 0.1128),
    (0.0032, 0.0581, 0.0639),
    (-0.1251, 0.0927, 0.1699),
    (0.0060, -0.0633, 0.0005),
    (0.3477, 0.2275, 0.2950),
    (0.1984, 0.0913, 0.1861),
)
WAN_BIAS = (-0.1835, -0.0868, -0.3360)


@dataclass(frozen=True, slots=True)
class LatentToRGB:
    """A linear map from a latent pixel to its colour: `matrix [C, 3]`, `bias [3]`, colours in 0 to 1."""

    matrix: Tensor
    bias: Tensor

    def __call__(self, latents: Tensor) -> Frame:
        """Latents `[C, T, h, w]` to uint8 frames `[T, h, w, 3]`."""
        matrix = self.matrix.to(latents.device, torch.float32)
        colours = torch.einsum("cthw,cr->thwr", latents.float(), matrix) + self.bias.to(latents.device, torch.float32)
        picture: Frame = colours.mul(255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        return picture


def find_colours(spec: ModelSpec, folder: Path | None) -> LatentToRGB | None:
    """The map for a model's VAE: Wan2.1's, or the one in the model's folder; None if that has no usable map."""
    if spec.vae == WAN_1_3B.vae:
        return LatentToRGB(torch.tensor(WAN_FACTORS) / 2, torch.tensor(WAN_BIAS) / 2 + 0.5)
    path = None if folder is None else folder / COLOURS_FILE
    if path is None or not path.exists():
        return None
    try:
        table = torch.tensor(parse_json(read_file(path)), dtype=torch.float32)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        log.warning("no colours for previews", file=COLOURS_FILE, error=type(error).__name__)
        return None
    if table.shape != (spec.vae.z_dim + 1, 3):
        log.warning("no colours for previews", file=COLOURS_FILE, shape=list(table.shape))
        return None
    return LatentToRGB(table[:-1], table[-1])
