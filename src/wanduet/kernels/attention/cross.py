"""Attention to the text in Triton: a head's few keys stay on the chip while the kernel streams its queries.

Imported lazily, only if Triton is installed. A prompt has some hundred keys, so reading q and writing the result take
most of the time. With a general attention kernel, another kernel must first normalise and write q, and attention covers
all 512 positions of the padded text, most of which have the same key (see `plain.text_attention`).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton reads the annotations of a kernel's parameters itself.)

from dataclasses import dataclass
from math import log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanduet.kernels.device import WGMMA_SHARED_MEMORY, multiprocessors, on_device_of, shared_memory
from wanduet.kernels.dit import plain

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class TextTile:
    """Tile of a program: its queries and keys at a time. `programs`: number of programs per multiprocessor."""

    queries: int = 64
    keys: int = 128
    warps: int = 4
    stages: int = 3
    programs: int = 3


def tile_for(num_keys: int, itemsize: int, limit: int) -> TextTile:
    """Return the tile for `num_keys` text keys of `itemsize` bytes a value, and heads of 128 channels.

    `limit`: bytes of shared memory of a program. The tile for wgmma was measured on an H100. The others take at most 99
    KiB and keep every value in a register, as compiled for 8.0 to 12.0 (benchmarks/compile_ahead.py).
    """
    if itemsize == 4:
        return TextTile(32, 32, 4, 2)
    if limit >= WGMMA_SHARED_MEMORY:
        return TextTile()
    return TextTile(64, 128, 8, 2) if num_keys <= 128 else TextTile(64, 64, 8, 2)


@triton.jit(do_not_specialize=["length"])  # type: ignore[untyped-decorator]
def _row_factor_kernel(
    q_ptr, factor_ptr, q_batch, q_row, length, eps, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Write `1 / sqrt(mean(q**2) + eps)` of each row."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row[:, None] < length) & (column < C)
    q = tl.load(q_ptr + batch * q_batch + row.to(tl.int64)[:, None] * q_row + column, mask, 0.0).to(tl.float32)
    tl.store(factor_ptr + batch * length + row, tl.rsqrt(tl.sum(q * q, 1) / C + eps), row < length)


@triton.jit(do_not_specialize=["length", "num_keys"])  # type: ignore[untyped-decorator]
def _text_attention_kernel(
    q_ptr, factor_ptr, weight_ptr, k_ptr, v_ptr, out_ptr,
    q_batch, q_row, k_batch, k_key, v_batch, v_key, out_batch, out_row,
    length, num_keys, scale, last_bias,
    D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, ONE_BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute every `num_programs(1)`-th tile of one head's queries.

    `scale`: log2(e) / sqrt(D). `last_bias`: the base-2 logarithm of the number of times that the last key counts.
    """
    first = tl.program_id(0) * D
    batch = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, D)
    weight = tl.load(weight_ptr + first + channel).to(tl.float32)[None, :]
    q_ptr += batch * q_batch + first
    k_ptr += batch * k_batch + first
    v_ptr += batch * v_batch + first
    out_ptr += batch * out_batch + first
    if ONE_BLOCK:
        k, v, bias = _keys_values(k_ptr, v_ptr, k_key, v_key, 0, num_keys, last_bias, KEYS, D)
    for tile in tl.range(tl.program_id(1), tl.cdiv(length, QUERIES), tl.num_programs(1), num_stages=STAGES):
        row = tile * QUERIES + tl.arange(0, QUERIES)
        is_row = row < length
        at = row.to(tl.int64)[:, None]
        q = tl.load(q_ptr + at * q_row + channel[None, :], is_row[:, None], 0.0)
        factor = tl.load(factor_ptr + batch * length + row, is_row, 0.0)
        q = (q.to(tl.float32) * factor[:, None] * weight).to(q_ptr.dtype.element_ty)
        if ONE_BLOCK:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias[None, :]
            weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
            total = tl.sum(weights, 1)
            out = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        else:
            highest = tl.full((QUERIES,), -float("inf"), tl.float32)
            total = tl.zeros((QUERIES,), tl.float32)
            out = tl.zeros((QUERIES, D), tl.float32)
            for start in range(0, num_keys, KEYS):
                k, v, bias = _keys_values(k_ptr, v_ptr, k_key, v_key, start, num_keys, last_bias, KEYS, D)
                scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias[None, :]
                highest, total, out = weigh(scores, v, highest, total, out)
        out_at = out_ptr + at * out_row + channel[None, :]
        tl.store(out_at, (out / total[:, None]).to(out_ptr.dtype.element_ty), is_row[:, None])


@triton.jit
def weigh(scores, values, highest, total, out):
    """Add a block of keys: update each query's highest score so far (base 2), sum of exponentials and weighted sum of
    values (Milakov, arXiv 1805.02867)."""
    higher = tl.maximum(highest, tl.max(scores, 1))
    shrink = tl.exp2(highest - higher)
    weights = tl.exp2(scores - higher[:, None])
    total = total * shrink + tl.sum(weights, 1)
    return higher, total, tl.dot(weights.to(values.dtype), values, out * shrink[:, None], input_precision="ieee")


@triton.jit  # type: ignore[untyped-decorator]
def _keys_values(
    k_ptr, v_ptr, k_key, v_key, start, num_keys, last_bias, KEYS: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Load a block of keys and values; return them and the bias of their scores."""
    key = start + tl.arange(0, KEYS)
    channel = tl.arange(0, D)[None, :]
    is_key = key < num_keys
    k = tl.load(k_ptr + key[:, None] * k_key + channel, is_key[:, None], 0.0)
    v = tl.load(v_ptr + key[:, None] * v_key + channel, is_key[:, None], 0.0)
    bias = tl.where(is_key, tl.where(key == num_keys - 1, last_bias, 0.0), -float("inf"))
    return k, v, bias


def text_attention(q: Tensor, weight: Tensor, eps: float, keys: Tensor, values: Tensor, repeats: int) -> Tensor:
    """See `plain.text_attention`; overwrites q with the result."""
    if torch.is_grad_enabled() or keys.shape[3] & (keys.shape[3] - 1):  # a block's sides must be powers of two
        return plain.text_attention(q, weight, eps, keys, values, repeats)
    batch, length, width = q.shape
    num_keys, heads, head_dim = keys.shape[1:]
    if any(x.stride(-1) != 1 or x.stride(-2) != head_dim for x in (keys, values)) or q.stride(-1) != 1:
        raise ValueError("Attention to the text needs heads and channels that lie side by side in memory.")
    tile = tile_for(num_keys, q.itemsize, shared_memory(q.device))
    block = min(tile.keys, max(16, triton.next_power_of_2(num_keys)))
    rows = max(1, 4096 // triton.next_power_of_2(width))
    factor = q.new_empty((batch, length), dtype=torch.float32)
    programs = min(triton.cdiv(length, tile.queries), max(1, tile.programs * multiprocessors(q.device) // heads))
    with on_device_of(q):
        _row_factor_kernel[(triton.cdiv(length, rows), batch)](
            q, factor, q.stride(0), q.stride(1), length, eps,
            C=width, BLOCK=triton.next_power_of_2(width), ROWS=rows, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        _text_attention_kernel[(heads, programs, batch)](
            q, factor, weight, keys, values, q, q.stride(0), q.stride(1), keys.stride(0), keys.stride(1),
            values.stride(0), values.stride(1), q.stride(0), q.stride(1),
            length, num_keys, LOG2_E * head_dim**-0.5, log2(repeats),
            D=head_dim, QUERIES=tile.queries, KEYS=block, ONE_BLOCK=num_keys <= block, STAGES=tile.stages,
            num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return q
