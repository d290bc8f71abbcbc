"""The VAE's operations as GPUs do them, by Triton. Here is what they allocate; the kernels are in vae_triton.py and
conv_triton.py, imported only where they run. On the meta device nothing runs, so that memory can be predicted on a
machine that has no Triton.

Two sets: `VAE_INPUT_KERNELS` writes a convolution's input in one pass and leaves the convolution to PyTorch (cuDNN);
`VAE_OWN_KERNELS` convolves itself, from where the input, the past and the residual lie. Both want weights in
channels-last memory, and give results in it.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor

from wanduet.ops import vae_fused
from wanduet.ops.vae_fused import VAEKernels, empty_clip, with_input


def causal_input(x: Tensor, past: Tensor | None, pads: tuple[int, int], frames: int, gamma: Tensor | None) -> Tensor:
    """See `vae_fused.causal_input`; the result is channels last."""
    nothing = not frames and pads == (0, 0) and gamma is None
    if nothing or torch.is_grad_enabled():
        return vae_fused.causal_input(x, past, pads, frames, gamma)
    x, past = _channels_last(x), _channels_last(past)
    out = empty_clip(x, x.shape[1], frames + x.shape[2], sum(pads) + x.shape[3], x.shape[4])
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
    if torch.is_grad_enabled():
        return vae_fused.causal_conv(x, past, weight, bias, pads, gamma, residual, consume)
    x, past, residual = _channels_last(x), _channels_last(past), _channels_last(residual)
    if gamma is not None:
        dense = x.is_contiguous(memory_format=torch.channels_last_3d)
        normed = x if consume and dense else empty_clip(x, *x.shape[1:])
        _write_input(x, None, (0, 0), 0, gamma, normed)
        x = normed
    frames = weight.shape[2] - 1
    out = empty_clip(x, weight.shape[0], x.shape[2], x.shape[3] + sum(pads) - (weight.shape[3] - 1), x.shape[4])
    _convolve(x, past, weight, bias, pads, 1, residual, out)
    if x.shape[2] < frames:  # the new past is partly the old one
        before = empty_clip(x, x.shape[1], frames, *x.shape[3:]).zero_() if past is None else past
        x = torch.cat((before, x), dim=2)
    return out, x[:, :, x.shape[2] - frames :]


def double_conv(x: Tensor, weight: Tensor, bias: Tensor, pads: tuple[int, int], out: Tensor) -> None:
    """See `vae_fused.DoubleConv`: the doubled image is never there."""
    _convolve(_channels_last(x), None, weight.unsqueeze(2), bias, pads, 2, None, out)


Some = TypeVar("Some", Tensor, Tensor | None)


def _channels_last(x: Some) -> Some:
    """With channels side by side: itself, but for what enters the VAE."""
    if x is None or x.stride(1) == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last_3d)


def _write_input(x: Tensor, *rest: Any) -> None:
    """`vae_triton.write_causal_input`, where there is something to write."""
    if x.device.type != "meta":
        from wanduet.ops.vae_triton import write_causal_input

        write_causal_input(x, *rest)


def _convolve(x: Tensor, *rest: Any) -> None:
    """`conv_triton.convolve`, where there is something to convolve."""
    if x.device.type != "meta":
        from wanduet.ops.conv_triton import convolve

        convolve(x, *rest)


VAE_INPUT_KERNELS = with_input("triton", causal_input)
VAE_OWN_KERNELS = VAEKernels("triton-conv", causal_conv, double_conv)
