"""A tiny decoder for previews: latents to small pictures, hundreds of times cheaper than the VAE.

The architecture is that of TAEHV (Tiny AutoEncoder for Hunyuan Video, github.com/madebyollin/taehv), whose
weights for Wan2.1's latents go by `taew2_1`; parameter names are that file's, so its decoder loads as it is.
LightX2V's `lighttaew2_1` has the same names and shapes.

It runs without the upsampling in time, and without some of that in space, both of which the architecture allows
for previews: one latent frame gives one picture, the last of the frames it stands for. A picture then depends on
the latent frame and on what each block saw of the frame before, which the caller carries along.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

WIDTHS = (256, 128, 64)  # channels of the three stages; each ends in an upsampling in space
LATENT_CHANNELS = 16
BLOCKS = 3  # in a stage
TIME_STRIDES = (1, 2, 2)  # frames that a stage's `TGrow` makes of one
FeatureCache = tuple[Tensor, ...]


class MemoryBlock(nn.Module):
    """A residual block that sees a frame beside the same place's input for the frame before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """Two of `[1, C, h, w]` to one."""
        y: Tensor = self.conv(torch.cat([x, past], dim=1))
        return torch.relu(y + x)


class TimeGrow(nn.Module):
    """Of the frames that a frame grows into, the last."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[1, C, h, w]` to the same shape; the last `C` output channels belong to the last frame."""
        return nn.functional.conv2d(x, self.conv.weight[-x.shape[1] :])


class Upsample(nn.Module):
    """Twice the pixels each way, unless the preview is large enough without."""

    def forward(self, x: Tensor, wanted: bool) -> Tensor:
        """`[1, C, h, w]` to `[1, C, 2h, 2w]`, or unchanged."""
        return interpolate(x, scale_factor=2.0) if wanted else x


class PreviewDecoder(nn.Module):
    """Normalised latents (what the transformer denoises) to pictures with values in 0 to 1.

    `mean` and `std` `[C]` are for weights that were trained on latents before normalisation.
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
        """Latents `[C, T, h, w]` to `T` pictures `[3, h·2^doublings, w·2^doublings]`, one after the other."""
        past: FeatureCache | None = None
        for frame in latents.unbind(1):
            picture, past = self.step(frame[None], past, doublings)
            yield picture[0]

    def step(self, z: Tensor, past: FeatureCache | None, doublings: int) -> tuple[Tensor, FeatureCache]:
        """One latent frame `[1, C, h, w]` to its picture, and what the next frame's blocks must know."""
        x = z.to(next(self.parameters()))
        if self._mean is not None and self._std is not None:
            x = x * self._std.to(x)[:, None, None] + self._mean.to(x)[:, None, None]
        x = 3 * torch.tanh(x / 3)  # outliers of early steps would saturate everything after them
        seen: list[Tensor] = []
        levels = 0
        for layer in self.decoder:
            if isinstance(layer, MemoryBlock):
                before = torch.zeros_like(x) if past is None else past[len(seen)]
                seen.append(x)
                x = layer(x, before)
            elif isinstance(layer, Upsample):
                x = layer(x, levels < doublings)
                levels += 1
            else:
                x = layer(x)
        return x.clamp(0, 1), tuple(seen)


def _conv(inputs: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)
