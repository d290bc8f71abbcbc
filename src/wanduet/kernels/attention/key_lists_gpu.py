"""Triton kernels that choose key blocks: see `key_lists`, whose plain forms they are compared with.

All lists of an attention of 32,760 tokens take a few percent of the attention's time at a fifth of the keys. Imported
lazily, only if Triton is installed.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton reads the annotations of a kernel's parameters itself.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanduet.kernels.device import on_device_of

TOKENS = 32  # that a program of `pool_blocks` adds up at a time
SIDE, DEPTH = 32, 32  # of a tile of `block_scores`, and its channels at a time


@triton.jit(do_not_specialize=["length"])  # type: ignore[untyped-decorator]
def _pool_kernel(
    x_ptr, starts_ptr, out_ptr, x_batch, x_row, x_head, length, mean_factor, square_factor,
    D: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, STARTS: tl.constexpr, TOKENS: tl.constexpr,
    SQUARES: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """Write the mean of one block of tokens of one head and, with `SQUARES`, the second moment behind it. Programs that run
    together read the same tokens' heads."""
    head, block, batch = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if STARTS:
        start, stop = tl.load(starts_ptr + block), tl.load(starts_ptr + block + 1)
    else:
        start = block * SIZE
        stop = tl.minimum(start + SIZE, length)
    channel = tl.arange(0, BLOCK)
    is_channel = channel < D
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    squares = tl.zeros((TOKENS, BLOCK), tl.float32)
    for first in tl.static_range(0, SIZE, TOKENS):
        token = start + first + tl.arange(0, TOKENS)
        at = batch * x_batch + head * x_head + token.to(tl.int64)[:, None] * x_row + channel[None, :]
        x = tl.load(x_ptr + at, (token < stop)[:, None] & is_channel[None, :], 0.0).to(tl.float32)
        total += x
        if SQUARES:
            squares += x * x
    count = (stop - start).to(tl.float32)
    mean = tl.sum(total, 0) / count
    out_ptr += ((batch * tl.num_programs(0) + head) * tl.num_programs(1) + block) * (2 * D if SQUARES else D)
    tl.store(out_ptr + channel, mean * mean_factor, is_channel)
    if SQUARES:
        square = tl.sum(squares, 0) / count
        if CENTRED:
            square -= mean * mean
        tl.store(out_ptr + D + channel, square * square_factor, is_channel)


def pool_blocks(x: Tensor, size: int, starts: Tensor | None) -> Tensor:
    """See `key_lists.pool_blocks`; the channels of a head must be contiguous."""
    return _pool(x, size, starts, None)


def block_moments(x: Tensor, size: int, moments: tuple[float, float, bool]) -> Tensor:
    """See `key_lists.block_moments`; the channels of a head must be contiguous."""
    return _pool(x, size, None, moments)


def _pool(x: Tensor, size: int, starts: Tensor | None, moments: tuple[float, float, bool] | None) -> Tensor:
    batch, length, heads, head_dim = x.shape
    blocks = triton.cdiv(length, size) if starts is None else starts.shape[0] - 1
    mean, square, centred = moments or (1.0, 1.0, False)
    width = head_dim if moments is None else 2 * head_dim
    out = x.new_empty((batch, heads, blocks, width), dtype=torch.float32)
    with on_device_of(x):
        _pool_kernel[(heads, blocks, batch)](
            x, x if starts is None else starts, out, *x.stride()[:3], length, mean, square,
            D=head_dim, BLOCK=triton.next_power_of_2(head_dim), SIZE=size, STARTS=starts is not None, TOKENS=TOKENS,
            SQUARES=moments is not None, CENTRED=centred, num_warps=2, enable_fp_fusion=True,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows", "columns"])  # type: ignore[untyped-decorator]
def _scores_kernel(
    q_ptr, k_ptr, out_ptr, rows, columns, D: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """Write a tile of one head's products. The order of summation depends on D only. Each factor is three TF32 numbers: a product
    is as exact as in float32, and on tensor cores."""
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    q_ptr += head * rows * D
    k_ptr += head * columns * D
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for first in tl.static_range(0, D, DEPTH):
        channel = first + tl.arange(0, DEPTH)
        is_channel = channel < D
        q = tl.load(q_ptr + row[:, None] * D + channel[None, :], (row < rows)[:, None] & is_channel[None, :], 0.0)
        k = tl.load(
            k_ptr + column[None, :] * D + channel[:, None], (column < columns)[None, :] & is_channel[:, None], 0.0
        )
        total = tl.dot(q, k, total, input_precision="tf32x3")
    at = out_ptr + head * rows * columns + row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(at, total, (row < rows)[:, None] & (column < columns)[None, :])


def block_scores(q: Tensor, k: Tensor) -> Tensor:
    """See `key_lists.block_scores`; both are contiguous."""
    (batch, heads, rows, head_dim), columns = q.shape, k.shape[2]
    out = q.new_empty((batch, heads, rows, columns))
    with on_device_of(q):
        _scores_kernel[(triton.cdiv(rows, SIDE), triton.cdiv(columns, SIDE), batch * heads)](
            q, k, out, rows, columns, D=head_dim, SIDE=SIDE, DEPTH=DEPTH, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["columns", "kept"])  # type: ignore[untyped-decorator]
def _highest_kernel(scores_ptr, index_ptr, columns, kept, COLUMNS: tl.constexpr):
    """Write the columns of one row's `kept` highest scores.

    Scores become integers of the same order; the lowest integer that is kept is found bit by bit, from the highest.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    is_column = column < columns
    bits = tl.load(scores_ptr + row * columns + column, is_column, 0.0).to(tl.int32, bitcast=True)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483649  # 1 or more: floats by size
    order = tl.where(is_column, order, 0)
    lowest = tl.full((), 0, tl.int64)
    step = tl.full((), 1, tl.int64) << 32
    for _ in range(33):
        higher = lowest + step
        lowest = tl.where(tl.sum((order >= higher).to(tl.int32), 0) >= kept, higher, lowest)
        step = step >> 1
    above, equal = order > lowest, order == lowest
    spare = kept - tl.sum(above.to(tl.int32), 0)
    taken = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= spare))
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(index_ptr + row * kept + place, column, taken)


def highest_blocks(scores: Tensor, kept: int) -> Tensor:
    """See `key_lists.highest_blocks`; `scores` are contiguous."""
    index = torch.empty((*scores.shape[:3], kept), dtype=torch.int32, device=scores.device)
    columns = triton.next_power_of_2(scores.shape[3])
    with on_device_of(scores):
        _highest_kernel[(scores.shape[:3].numel(),)](
            scores, index, scores.shape[3], kept, COLUMNS=columns, num_warps=max(1, min(8, columns // 256)),
            enable_fp_fusion=True,
        )  # fmt: skip
    return index
