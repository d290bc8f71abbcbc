"""What the VAE does between its convolutions, in as few passes as possible, with its plain PyTorch form."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CausalInput = Callable[[Tensor, Tensor | None, tuple[int, int], int, Tensor | None], Tensor]
NormSilu = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class VAEKernels:
    """One implementation of the operation below."""

    name: str
    causal_input: CausalInput


def norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """`silu(x / |x| * sqrt(C) * gamma)` of `[B, C, ...]`, the norm over channels in float32."""
    normalized = F.normalize(x.float(), dim=1).to(x.dtype) * (x.shape[1] ** 0.5) * gamma
    return F.silu(normalized, inplace=not torch.is_grad_enabled())


def causal_input(
    x: Tensor,
    past: Tensor | None,
    pads: tuple[int, int],
    frames: int,
    gamma: Tensor | None,
    norm_silu: NormSilu = norm_silu,
) -> Tensor:
    """The input of a causal convolution, written once: `frames` past frames, then `x`, with zero rows.

    x `[B, C, T, h, w]`; past `[B, C, frames, h + pads, w]` or None (zeros); pads zero rows above and below.
    With `gamma` `[C, 1, 1, 1]` the new frames are `norm_silu(x, gamma)`. Returns `[B, C, frames + T, h + pads, w]`, laid out in memory as x is.
    """
    top, bottom = pads
    if torch.is_grad_enabled():
        value = x if gamma is None else norm_silu(x, gamma)
        value = F.pad(value, (0, 0, top, bottom))
        before = value.new_zeros(*value.shape[:2], frames, *value.shape[3:]) if past is None else past
        return torch.cat((before, value), dim=2) if frames else value
    if not frames and not top and not bottom and gamma is None:
        return x
    batch, channels, length, height, width = x.shape
    shape = (batch, channels, frames + length, top + height + bottom, width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))
    if past is None:
        out[:, :, :frames].zero_()
    else:
        out[:, :, :frames].copy_(past)
    out[:, :, frames:, :top].zero_()
    out[:, :, frames:, top + height :].zero_()
    inside = out[:, :, frames:, top : top + height]
    if gamma is None:
        inside.copy_(x)
    else:
        for frame in range(length):  # one frame at a time: the temporaries stay small
            inside[:, :, frame : frame + 1].copy_(norm_silu(x[:, :, frame : frame + 1], gamma))
    return out


def _layout(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    return torch.channels_last_3d if channels_last else torch.contiguous_format


VAE_TORCH_KERNELS = VAEKernels("torch", causal_input)
