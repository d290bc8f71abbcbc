"""The VAE's operations as GPUs do them, by Triton. Here is what they allocate; the kernels are in vae_triton.py and
conv_triton.py, imported only where they run. On the meta device nothing runs, so that memory can be predicted on a
machine that has no Triton.

Two sets: `VAE_INPUT_KERNELS` writes a convolution's input in one pass and leaves the convolution to PyTorch (cuDNN);
`VAE_OWN_KERNELS` convolves itself, from where the input, the past and the residual lie.
"""

import torch
from torch import Tensor

from wanduet.ops import vae_fused
from wanduet.ops.vae_fused import VAEKernels, with_input


def causal_input(x: Tensor, past: Tensor | None, pads: tuple[int, int], frames: int, gamma: Tensor | None) -> Tensor:
    """See `vae_fused.causal_input`; that one runs for other layouts, and where nothing is to be done."""
    nothing = not frames and pads == (0, 0) and gamma is None
    if nothing or not _suits(x, past):
        return vae_fused.causal_input(x, past, pads, frames, gamma)
    out = _empty(x, x.shape[1], frames + x.shape[2], sum(pads) + x.shape[3], x.shape[4])
    _write_input(x, past, pads, frames, gamma, out)
    return out


def causal_conv(
    x: Tensor,
    past: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    pads: tuple[int, int],
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    consume: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `vae_fused.CausalConv`. Its past is of x's rows, without padding."""
    if not _suits(x, past, residual) or not _channels_last(weight):
        return vae_fused.causal_conv(x, past, weight, bias, pads, gamma, residual, consume, causal_input)
    if gamma is not None:
        dense = x.is_contiguous(memory_format=torch.channels_last_3d)
        normed = x if consume and dense else _empty(x, *x.shape[1:])
        _write_input(x, None, (0, 0), 0, gamma, normed)
        x = normed
    frames = weight.shape[2] - 1
    out = _empty(x, weight.shape[0], x.shape[2], x.shape[3] + sum(pads) - (weight.shape[3] - 1), x.shape[4])
    _convolve(x, past, weight, bias, pads, 1, residual, out)
    if x.shape[2] < frames:  # the new past is partly the old one
        before = x.new_zeros(*x.shape[:2], frames, *x.shape[3:]) if past is None else past
        x = torch.cat((before, x), dim=2)
    return out, x[:, :, x.shape[2] - frames :]


def double_conv(x: Tensor, weight: Tensor, bias: Tensor, pads: tuple[int, int], out: Tensor) -> None:
    """See `vae_fused.DoubleConv`: the doubled image is never there."""
    flat = weight.unsqueeze(2)
    if not _suits(x, out) or not _channels_last(flat):
        vae_fused.double_conv(x, weight, bias, pads, out)
        return
    _convolve(x, None, flat, bias, pads, 2, None, out)


def _suits(*tensors: Tensor | None) -> bool:
    """Whether channels lie side by side in all of them, and no gradients are wanted."""
    return not torch.is_grad_enabled() and all(x is None or x.stride(1) == 1 for x in tensors)


def _channels_last(weight: Tensor) -> bool:
    return weight.permute(0, 2, 3, 4, 1).is_contiguous()


def _empty(like: Tensor, channels: int, frames: int, rows: int, columns: int) -> Tensor:
    """`[B, channels, frames, rows, columns]`, channels last."""
    shape = (like.shape[0], channels, frames, rows, columns)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)


def _write_input(
    x: Tensor, past: Tensor | None, pads: tuple[int, int], frames: int, gamma: Tensor | None, out: Tensor
) -> None:
    if x.device.type != "meta":
        from wanduet.ops.vae_triton import write_causal_input

        write_causal_input(x, past, pads, frames, gamma, out)


def _convolve(
    x: Tensor,
    past: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    pads: tuple[int, int],
    up: int,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    if x.device.type != "meta":
        from wanduet.ops.conv_triton import convolve

        convolve(x, past, weight, bias, pads, up, residual, out)


VAE_INPUT_KERNELS = with_input("triton", causal_input)
VAE_OWN_KERNELS = VAEKernels("triton-conv", causal_conv, double_conv)
