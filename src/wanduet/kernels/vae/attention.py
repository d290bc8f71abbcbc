"""Matrix product and softmax in Triton for the attention of the VAE's mid block; `wanduet.kernels.vae.gpu` uses them.

Imported lazily, only if Triton is installed. A compiled kernel serves any number of pixels.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton reads the annotations of a kernel's parameters itself.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanduet.kernels.device import shared_memory
from wanduet.kernels.precision import convolutions_use_tf32
from wanduet.kernels.vae.norm import launch, rounded
from wanduet.kernels.vae.plain import uses_tf32

SOFTMAX_BLOCK = 4096  # values of a row at a time
SIDE = 128  # of the square tile of a product that a program computes
STRIP_BYTES = 128  # of each operand's rows at a time
# A product of few square tiles is split along the summed dimension into about `PROGRAMS` programs in all, each of which
# sums at least `LEAST_DEPTH` values.
PROGRAMS, LEAST_DEPTH = 264, 768


@triton.jit  # type: ignore[untyped-decorator]
def _product_kernel(
    x_ptr, weight_ptr, out_ptr, rows, inputs, outputs, depth,
    SIDE: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute a square tile of `x @ weight.T` of `[rows, inputs]` and `[outputs, inputs]`, summed over one part of
    `depth` inputs. `out` is `[parts, rows, outputs]`."""
    first = tl.program_id(1) * depth
    last = tl.minimum(first + depth, inputs)
    across = tl.cdiv(outputs, SIDE)
    row = (tl.program_id(0) // across) * SIDE + tl.arange(0, SIDE)
    column = (tl.program_id(0) % across) * SIDE + tl.arange(0, SIDE)
    part = tl.arange(0, DEPTH)
    x_at = x_ptr + row.to(tl.int64)[:, None] * inputs + part[None, :]
    weight_at = weight_ptr + column.to(tl.int64)[:, None] * inputs + part[None, :]
    is_row, is_column = (row < rows)[:, None], (column < outputs)[:, None]
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for start in range(first, last, DEPTH):
        there = (start + part < last)[None, :]
        values = tl.load(x_at + start, is_row & there, 0.0)
        weights = tl.load(weight_at + start, is_column & there, 0.0)
        total = tl.dot(values, tl.trans(weights), total, input_precision=PRECISION)
    out_at = out_ptr + (tl.program_id(1) * rows + row).to(tl.int64)[:, None] * outputs + column[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), is_row & (column < outputs)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _softmax_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr, TO_TF32: tl.constexpr):
    """Compute one row of `count` values, with maximum and sum in one pass (Milakov, arXiv 1805.02867)."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * count
    out_ptr += row * count
    part = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        value = tl.load(x_ptr + start + part, start + part < count, -float("inf"))
        before = largest
        largest = tl.maximum(before, value)
        safe = tl.where(largest == -float("inf"), 0.0, largest)  # a lane that has read no value yet
        total = total * tl.exp(before - safe) + tl.exp(value - safe)
    most = tl.max(largest, 0)
    factor = 1.0 / tl.sum(total * tl.exp(largest - most), 0)
    for start in range(0, count, BLOCK):
        inside = start + part < count
        value = tl.exp(tl.load(x_ptr + start + part, inside, -float("inf")) - most) * factor
        tl.store(out_ptr + start + part, rounded(value, TO_TF32).to(out_ptr.dtype.element_ty), inside)


def product(x: Tensor, weight: Tensor, out: Tensor, compile_for: torch.device | None = None) -> None:
    """Write `x @ weight.T` of `[L, I]` and `[O, I]` into `out` `[L, O]`, of any dtype; all must be contiguous."""
    (rows, inputs), outputs = x.shape, len(weight)
    squares = triton.cdiv(rows, SIDE) * triton.cdiv(outputs, SIDE)
    parts = max(1, min(PROGRAMS // squares, inputs // LEAST_DEPTH))
    depth = triton.cdiv(inputs, parts * SIDE) * SIDE
    parts = triton.cdiv(inputs, depth)
    sums = out if parts == 1 else torch.empty(parts, rows, outputs, dtype=torch.float32, device=x.device)
    stages = shared_memory(compile_for or x.device) // (2 * SIDE * STRIP_BYTES)
    launch(
        _product_kernel, (squares, parts), x.device, compile_for,
        x, weight, sums, rows, inputs, outputs, depth, SIDE=SIDE, DEPTH=STRIP_BYTES // x.itemsize,
        PRECISION="tf32" if convolutions_use_tf32() else "ieee", num_warps=8, num_stages=max(2, min(4, stages)),
    )  # fmt: skip
    if parts > 1:
        out.copy_(sums.sum(dim=0))


def softmax(scores: Tensor, out: Tensor, compile_for: torch.device | None = None) -> None:
    """Write the softmax of each row of float32 scores `[L, S]` into `out`, which may be `scores`; both contiguous."""
    launch(
        _softmax_kernel, (len(scores),), scores.device, compile_for, scores, out, scores.shape[1],
        BLOCK=SOFTMAX_BLOCK, TO_TF32=uses_tf32(out.dtype),
    )  # fmt: skip
