"""The VAE's operations on GPUs, in Triton. This module allocates; the kernels are in norm.py, conv.py and attention.py,
which are imported only where they run. On the meta device no kernel runs, so that memory can be predicted on a machine
without Triton.

Weights must be in channels-last memory; results are too.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from wanduet.kernels.precision import vae_precision
from wanduet.kernels.vae import plain
from wanduet.kernels.vae.plain import (
    NO_ROOM,
    NOT_FUSED,
    Epilogue,
    Filter,
    Fused,
    Room,
    VAEKernels,
    empty_clip,
    query_parts,
    round_to_tf32,
    uses_tf32,
)


def causal_conv(
    x: Tensor,
    past: Tensor | None,
    filter: Filter,
    fused: Fused = NOT_FUSED,
    room: Room = NO_ROOM,
    compile_for: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """See `plain.CausalConv`.

    The past frames have the rows of x, without padding. `compile_for`: see `compiling_for`.
    """
    if torch.is_grad_enabled():
        return plain.causal_conv(x, past, filter, fused, room)
    x, past = _channels_last(x), _channels_last(past)
    if fused.gamma is not None:
        whole_rows = (x.stride(3), x.stride(4)) == (x.shape[4] * x.shape[1], x.shape[1])
        normed = (
            x
            if fused.consume and whole_rows
            else empty_clip(x, x.shape[1], x.shape[2], x.shape[3], x.shape[4], room.whole)
        )
        _norm_silu(x, fused.gamma, normed, compile_for)
        x = normed
    weight, above = filter.weight, filter.pads[0]
    frames = weight.shape[2] - 1
    rows = x.shape[3] + sum(filter.pads) - (weight.shape[3] - 1)
    whole = empty_clip(x, weight.shape[0], x.shape[2], room.above + rows, x.shape[4], room.whole)
    out = whole[:, :, :, room.above :]
    corner = Filter(weight, filter.bias, (above, weight.shape[4] // 2))
    done = _convolve(x, past, corner, Epilogue(out, _channels_last(fused.residual), fused.out_gamma), compile_for)
    if fused.out_gamma is not None and not done:
        _norm_silu(out, fused.out_gamma, out, compile_for)
    if x.shape[2] < frames:  # the new past includes frames of the old one
        before = empty_clip(x, x.shape[1], frames, *x.shape[3:]).zero_() if past is None else past
        x = torch.cat((before, x), dim=2)
    return whole, x[:, :, x.shape[2] - frames :]


def double_weight(weight: Tensor) -> Tensor:
    """Return `[4, O, I, 2, 2]` of a kernel `[O, I, 3, 3]`: one kernel for each of the four pixels that a pixel becomes.

    Two of the three doubled rows under the kernel are equal, likewise two columns. So their weights are added, and four
    of nine taps remain (sums in float32, rounded once). Order: upper left, upper right, lower left, lower right.
    """
    kernels = [
        _halved(_halved(weight.float(), 2, lower), 3, right) for lower in (False, True) for right in (False, True)
    ]
    four = torch.stack(kernels).to(weight.dtype)
    if uses_tf32(four.dtype):
        round_to_tf32(four)
    return four.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)  # contiguous channels


def _halved(weight: Tensor, dim: int, second: bool) -> Tensor:
    """Reduce three taps along an axis to two, for the first or the second of the two pixels that a pixel becomes."""
    before, here, after = weight.unbind(dim)
    return torch.stack((before + here, after) if second else (before, here + after), dim)


def double_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    pads: tuple[int, int],
    out: Tensor,
    compile_for: torch.device | None = None,
) -> None:
    """See `plain.DoubleConv`. Never allocates the doubled image."""
    x = _channels_last(x)
    for index, kernel in enumerate(weight):
        lower, right = divmod(index, 2)
        # Without padding above, the first output row is a lower one, which needs its own input row and the next.
        first = lower if pads[0] else 1 - lower
        corner = int(bool(pads[0]) and not lower), 1 - right
        part = out[:, :, :, first::2, right::2]
        _convolve(x, None, Filter(kernel.unsqueeze(2), bias, corner), Epilogue(part), compile_for)


def attend(q: Tensor, k: Tensor, v: Tensor, compile_for: torch.device | None = None) -> Tensor:
    """See `plain.attend`. Uses matrix products, with scores and their sums in float32.

    PyTorch's fused kernels do not support a head of this width, and do not use matrix units for float32.
    """
    if torch.is_grad_enabled():
        return plain.attend(q, k, v)
    outs = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    own = torch.contiguous_format
    factors = (q * q.shape[-1] ** -0.5, k.clone(memory_format=own), v.transpose(1, 2).clone(memory_format=own))
    if uses_tf32(q.dtype):
        for factor in factors:
            round_to_tf32(factor)
    for q_LC, k_SC, v_CS, out_LC in zip(*factors, outs, strict=True):
        for queries, out in zip(*(query_parts(x[None]) for x in (q_LC, out_LC)), strict=True):
            scores = torch.empty(queries.shape[1], len(k_SC), dtype=torch.float32, device=q.device)
            shares = scores if q.dtype == torch.float32 else torch.empty_like(scores, dtype=q.dtype)
            if q.device.type != "meta" or compile_for is not None:
                from wanduet.kernels.vae.attention import product, softmax

                product(queries[0], k_SC, scores, compile_for)
                softmax(scores, shares, compile_for)
                product(shares, v_CS, out[0], compile_for)
    return outs


Some = TypeVar("Some", Tensor, Tensor | None)
Result = TypeVar("Result")


def _channels_last(x: Some) -> Some:
    """Return x with contiguous channels; only the VAE's input is copied."""
    if x is None or x.stride(1) == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last_3d)


def _norm_silu(x: Tensor, gamma: Tensor, out: Tensor, compile_for: torch.device | None) -> None:
    """Call `norm.norm_silu`, except on the meta device without `compile_for`."""
    if x.device.type != "meta" or compile_for is not None:
        from wanduet.kernels.vae.norm import norm_silu

        norm_silu(x, gamma, out, compile_for)


def _convolve(
    x: Tensor, past: Tensor | None, filter: Filter, epilogue: Epilogue, compile_for: torch.device | None
) -> bool:
    """Call `conv.convolve`, except on the meta device without `compile_for`."""
    if x.device.type == "meta" and compile_for is None:
        return True
    from wanduet.kernels.vae.conv import convolve

    return convolve(x, past, filter, epilogue, compile_for=compile_for)


def compiling_for(device: torch.device, tf32: bool | None = None) -> VAEKernels:
    """Return kernels for a run on the meta device that computes nothing but compiles every kernel for `device`.

    A real run with the same shapes and precision then does not wait for the compiler. `tf32`: see `WanVAE.tf32`. The
    process-wide precision is set for one operation at a time, not for the whole run.
    """

    def compiled(operation: Callable[..., Result]) -> Callable[..., Result]:
        def run(*args: Any, **options: Any) -> Result:
            with vae_precision(tf32):
                return operation(*args, compile_for=device, **options)

        return run

    return VAEKernels("compiling", compiled(causal_conv), double_weight, compiled(double_conv), compiled(attend))


VAE_TRITON_KERNELS = VAEKernels("triton", causal_conv, double_weight, double_conv, attend)
