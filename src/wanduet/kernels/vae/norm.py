"""The VAE's `silu(norm(x))` in one pass, in Triton. `wanduet.kernels.vae.gpu` launches it.

Imported lazily, only if Triton is installed. For channels-last tensors, in which the channels of a pixel are
contiguous: one program takes some pixels with all their channels. The plain form needs seven passes over x; this kernel
reads x once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton reads the annotations of a kernel's parameters itself.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanduet.kernels.device import on_device_of
from wanduet.kernels.vae.plain import uses_tf32

# Values in a program: pixels x channels. More would spill registers, fewer would not hide latency.
VALUES = 4096
EPS = 1e-12  # torch.nn.functional.normalize's


@triton.jit  # type: ignore[untyped-decorator]
def rounded(x, TO_TF32: tl.constexpr):
    """With `TO_TF32`, round float32 x to the nearest number of 11 bits, for values that only matrix products read: the
    matrix units would truncate the other bits, which makes every result slightly too small."""
    if TO_TF32:
        x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x


@triton.jit  # type: ignore[untyped-decorator]
def silu_rounded(x, TO_TF32: tl.constexpr):
    """Return `silu(x)` in float32, rounded for a matrix product."""
    return rounded(x * tl.sigmoid(x), TO_TF32)


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def _norm_silu_kernel(
    x_ptr, gamma_ptr, out_ptr, x_batch, x_frame, x_pixel, out_batch, out_frame, count, scale,
    C: tl.constexpr, BLOCK_C: tl.constexpr, PIXELS: tl.constexpr, EPS: tl.constexpr,
    TO_TF32: tl.constexpr,
):  # fmt: skip
    """Compute some of a frame's `count` pixels, which are `x_pixel` values apart in x and C in `out`.

    `scale`: sqrt(C).
    """
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    frame = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)[None, :]
    in_width = channel < C
    mask = (pixel < count)[:, None] & in_width
    x_ptr += batch * x_batch + frame * x_frame
    value = tl.load(x_ptr + (pixel * x_pixel)[:, None] + channel, mask, 0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(value * value, 1)), EPS)[:, None]
    gamma = tl.load(gamma_ptr + channel, in_width, 0.0).to(tl.float32)
    result = silu_rounded(value / length * scale * gamma, TO_TF32)
    out_ptr += batch * out_batch + frame * out_frame
    tl.store(out_ptr + (pixel * C)[:, None] + channel, result.to(out_ptr.dtype.element_ty), mask)


def launch(kernel, grid, device: torch.device, compile_for: torch.device | None, *args, **options) -> None:
    """Run a kernel on `device`, or only compile it for `compile_for`. Multiplications and additions are fused, which is
    the default of Triton before 3.10."""
    with on_device_of(compile_for or device):
        if compile_for is None:
            kernel[grid](*args, enable_fp_fusion=True, **options)
        else:
            kernel.warmup(*args, grid=grid, enable_fp_fusion=True, **options)


def norm_silu(x: Tensor, gamma: Tensor, out: Tensor, compile_for: torch.device | None = None) -> None:
    """Write `plain.norm_silu` of x `[B, C, T, h, w]` into `out`, both channels last; `out` may be x.

    The rows of a frame must follow each other without gaps (they may be some of a frame's rows); in `out` the pixels
    too. Raises ValueError otherwise.
    """
    batch, channels, frames, height, width = x.shape
    if height > 1 and x.stride(3) != width * x.stride(4):
        raise ValueError("The rows of a frame must follow each other without gaps.")
    block = triton.next_power_of_2(channels)
    pixels = max(1, VALUES // block)
    launch(
        _norm_silu_kernel, (triton.cdiv(height * width, pixels), frames, batch), x.device, compile_for,
        x, gamma, out, x.stride(0), x.stride(2), x.stride(4), out.stride(0), out.stride(2), height * width,
        float(channels**0.5), C=channels, BLOCK_C=block, PIXELS=pixels, EPS=EPS, TO_TF32=uses_tf32(x.dtype),
    )  # fmt: skip
