"""Triton kernels that write queries and keys as 8-bit integers, for `wanduet.kernels.attention.int8`.

A row is one token of one head. Its codes are `round(row @ R / step)`, where R is a Hadamard matrix and `step` is the
largest value of `row @ R` divided by 127. R spreads a channel with large values over all of them, and cancels in the
product of a query and a key (QuaRot, arXiv 2404.00456). Keys are coded without their mean over tokens, which changes all
scores of a query alike (SageAttention, arXiv 2410.02367). The mean is a sum in a fixed order, so that the same inputs
give the same codes. q and k themselves are never written.

Imported lazily, only if Triton is installed.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton reads the annotations of a kernel's parameters itself.)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanduet.kernels.device import on_device_of

ROWS = 128  # the number of coded rows is a multiple of it
CODED_ROWS = 64  # of a program
PARTS = 32  # of the sequence at most, whose keys are added up side by side
PART_ROWS = 128  # at least, of a part
# Adding 1.5 * 2**23 to a float32 leaves its rounded value in the lower bits, and an integer below 2**22 added to these
# bits is read back as a float32: conversions take one instruction of full rate.
MAGIC = tl.constexpr(12582912.0)
MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit(do_not_specialize=["length"])  # type: ignore[untyped-decorator]
def _sum_kernel(
    x_ptr, sums_ptr, x_batch, x_row, x_head, length, D: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Write the sum of one part of one head's rows."""
    part, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    x_ptr += batch * x_batch + head * x_head
    rows = tl.cdiv(tl.cdiv(length, PARTS), ROWS) * ROWS
    channel = tl.arange(0, D)
    total = tl.zeros((ROWS, D), tl.float32)
    for start in range(part * rows, tl.minimum((part + 1) * rows, length), ROWS):
        row = start + tl.arange(0, ROWS)
        at = x_ptr + row.to(tl.int64)[:, None] * x_row + channel[None, :]
        total += tl.load(at, (row < length)[:, None], 0.0).to(tl.float32)
    at = ((batch * tl.num_programs(1) + head) * PARTS + part) * D
    tl.store(sums_ptr + at + channel, tl.sum(total, 0))


@triton.jit  # type: ignore[untyped-decorator]
def _signs(D: tl.constexpr):
    """Return a Hadamard matrix `[D, D]`, times sqrt(D)."""
    parity = tl.arange(0, D)[:, None] & tl.arange(0, D)[None, :]
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    return 1.0 - 2.0 * (parity & 1).to(tl.float32)


@triton.jit(do_not_specialize=["length"])  # type: ignore[untyped-decorator]
def _mean_kernel(sums_ptr, means_ptr, length, D: tl.constexpr, PARTS: tl.constexpr):
    """Write one head's mean, and its product with the Hadamard matrix."""
    head = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    channel = tl.arange(0, D)
    total = tl.zeros((D,), tl.float32)
    for part in range(PARTS):
        total += tl.load(sums_ptr + (head * PARTS + part) * D + channel)
    mean = total / length
    tl.store(means_ptr + head * 2 * D + channel, mean)
    tl.store(means_ptr + (head * 2 + 1) * D + channel, tl.sum(mean[:, None] * _signs(D), 0))


@triton.jit(do_not_specialize=["length"])  # type: ignore[untyped-decorator]
def _code_kernel(
    x_ptr, means_ptr, codes_ptr, scale_ptr, extra_ptr, x_batch, x_row, x_head, length, padded, factor,
    D: tl.constexpr, ROWS: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """Write the codes and factors of `ROWS` rows of one head; `means_ptr`: what `_mean_kernel` wrote."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    index = batch * tl.num_programs(1) + head
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, D)
    x_ptr += batch * x_batch + head * x_head
    is_row = row < length
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * x_row + channel[None, :], is_row[:, None], 0.0)
    rotated = tl.dot(x, _signs(D).to(x.dtype), input_precision="ieee")
    mean = tl.load(means_ptr + (index * 2 + OF_KEYS) * D + channel)[None, :]
    if OF_KEYS:
        rotated -= mean
    # The sum makes the factor of a row with NaN or infinity NaN, which a code cannot be.
    step = tl.maximum(tl.max(tl.abs(rotated), 1), 1e-30) / 127 + 0 * tl.sum(rotated, 1)
    codes = (rotated / step[:, None] + MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS
    tl.store(codes_ptr + (index * padded + row.to(tl.int64)[:, None]) * D + channel[None, :], codes.to(tl.int8))
    at = index * padded + row
    if OF_KEYS:
        tl.store(scale_ptr + at, tl.where(is_row, step, 0.0))
        tl.store(extra_ptr + at, tl.where(is_row, -MAGIC * step, -float("inf")))
    else:
        tl.store(scale_ptr + at, step * (factor / D))
        tl.store(extra_ptr + at, tl.sum(x.to(tl.float32) * mean, 1) * factor)


@dataclass(frozen=True, slots=True)
class Codes:
    """Coded rows of every head, up to a multiple of `ROWS`.

    `codes` `[B, H, padded, C]` int8; `scale` and `extra` `[B, H, padded]` float32. The product of a query and a key in
    the coded channels, times `factor`, is `q.scale * (k.scale * product of codes) + q.extra`. `extra` of keys is
    `-MAGIC * scale`, or minus infinity for a row beyond the last.
    """

    codes: Tensor
    scale: Tensor
    extra: Tensor

    @property
    def padded(self) -> int:
        """Number of coded rows of a head."""
        return self.codes.shape[2]


def encode(q: Tensor, k: Tensor, channels: int, factor: float = 1.0, spare: int = 0) -> tuple[Codes, Codes]:
    """Return the codes of the first `channels` channels of q `[B, L, H, D]` and k `[B, S, H, D]`.

    `channels`: a power of two from 32 to 128. `factor`: of the products, applied to queries. `spare`: this many rows of
    keys at least beyond the last are coded too. The channels of a head must be contiguous.
    """
    batch, length, heads, _ = k.shape
    parts = min(PARTS, triton.next_power_of_2(triton.cdiv(length, PART_ROWS)))
    sums = k.new_empty((batch, heads, parts, channels), dtype=torch.float32)
    means = k.new_empty((batch, heads, 2, channels), dtype=torch.float32)
    results = []
    with on_device_of(k):
        _sum_kernel[(parts, heads, batch)](
            k, sums, *k.stride()[:3], length, D=channels, ROWS=32, PARTS=parts, num_warps=4, enable_fp_fusion=True
        )
        _mean_kernel[(heads, batch)](
            sums, means, length, D=channels, PARTS=parts, num_warps=8, enable_fp_fusion=True
        )  # fmt: skip
        for x in (q, k):
            padded = triton.cdiv(x.shape[1] + (spare if x is k else 0), ROWS) * ROWS
            codes = x.new_empty((batch, heads, padded, channels), dtype=torch.int8)
            scale, extra = x.new_empty((2, batch, heads, padded), dtype=torch.float32)
            _code_kernel[(padded // CODED_ROWS, heads, batch)](
                x, means, codes, scale, extra, *x.stride()[:3], x.shape[1], padded, factor,
                D=channels, ROWS=CODED_ROWS, OF_KEYS=x is k, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
            results.append(Codes(codes, scale, extra))
    return results[0], results[1]
