"""A tiny decoder for previews: latents to small pictures, hundreds of times cheaper than the VAE.

The architecture is that of TAEHV (Tiny AutoEncoder for Hunyuan Video, github.com/madebyollin/taehv), whose weights for
Wan2.1's latents are called `taew2_1`; parameter names are that file's, so its decoder loads unchanged. LightX2V's
`lighttaew2_1` has the same names and shapes.

It skips the upsampling in time, and part of that in space, both of which the architecture allows for previews: one
latent frame gives one picture, the last of the frames that it encodes. The picture depends on the latent frame and on
each block's input for the frame before, the feature cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

WIDTHS = (256, 128, 64)  # channels of the three stages; each ends with an upsampling in space
LATENT_CHANNELS = 16
BLOCKS = 3  # in a stage
TIME_STRIDES = (1, 2, 2)  # frames that a stage's `TGrow` makes of one
FeatureCache = tuple[Tensor, ...]  # the last input of each `MemoryBlock`, `[1, C, h, w]`


class MemoryBlock(nn.Module):
    """A residual block over a frame's features and its own input for the frame before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """`x` and the input for the frame before, each `[1, C, h, w]`, to `[1, C, h, w]`."""
        y: Tensor = self.conv(torch.cat([x, before], dim=1))
        return torch.relu(y + x)


class TimeGrow(nn.Module):
    """Upsampling in time, of which only the last frame is computed."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[1, C, h, w]` to the same shape; the last `C` output channels belong to the last frame."""
        return nn.functional.conv2d(x, self.conv.weight[-x.shape[1] :])


class Upsample(nn.Module):
    """Double rows and columns (nearest neighbour), unless the preview is large enough already."""

    def forward(self, x: Tensor, enabled: bool) -> Tensor:
        """`[1, C, h, w]` to `[1, C, 2h, 2w]`; unchanged if not `enabled`."""
        return interpolate(x, scale_factor=2.0) if enabled else x


class PreviewDecoder(nn.Module):
    """Normalised latents, as the transformer denoises them, to RGB pictures in [0, 1].

    `mean` and `std` `[C]`: of the latents, for weights that were trained on latents before normalisation.
    """

    def __init__(self, mean: Tensor | None = None, std: Tensor | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Identity(), _conv(LATENT_CHANNELS, WIDTHS[0]), nn.ReLU()]
        for width, following, stride in zip(WIDTHS, (*WIDTHS[1:], WIDTHS[-1]), TIME_STRIDES, strict=True):
            layers += [MemoryBlock(width) for _ in range(BLOCKS)]
            layers += [Upsample(), TimeGrow(width, stride), _conv(width, following, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), _conv(WIDTHS[-1], 3))
        self._mean, self._std = mean, std

    def pictures(self, latents: Tensor, doublings: int = 3) -> Iterator[Tensor]:
        """Latents `[C, T, h, w]` to `T` pictures `[3, h·2^doublings, w·2^doublings]`, one after the other.

        `doublings`: 0 to 3.
        """
        feature_cache: FeatureCache | None = None
        for frame in latents.unbind(1):
            picture, feature_cache = self.step(frame[None], feature_cache, doublings)
            yield picture[0]

    def step(self, z: Tensor, feature_cache: FeatureCache | None, doublings: int) -> tuple[Tensor, FeatureCache]:
        """One latent frame `[1, C, h, w]` to its picture `[1, 3, H, W]`, and the feature cache for the next frame."""
        x = z.to(next(self.parameters()))
        if self._mean is not None and self._std is not None:
            x = x * self._std.to(x)[:, None, None] + self._mean.to(x)[:, None, None]
        x = 3 * torch.tanh(x / 3)  # outliers of early steps would saturate all later layers
        inputs: list[Tensor] = []
        levels = 0
        for layer in self.decoder:
            if isinstance(layer, MemoryBlock):
                before = torch.zeros_like(x) if feature_cache is None else feature_cache[len(inputs)]
                inputs.append(x)
                x = layer(x, before)
            elif isinstance(layer, Upsample):
                x = layer(x, levels < doublings)
                levels += 1
            else:
                x = layer(x)
        return x.clamp(0, 1), tuple(inputs)


def _conv(inputs: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)
