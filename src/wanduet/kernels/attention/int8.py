"""Self-attention in Triton whose scores are computed in 8-bit integers, for GPUs from capability 8.0 on.

Tensor cores multiply 8-bit integers at 2 times the rate of 16-bit floats, on GeForce cards at 4 times the rate of 16-bit
floats with float32 sums. The result is approximate:

- Scores: every query and every key has a factor of its own (`wanduet.kernels.attention.int8_codes`), where SageAttention
  has one for 128 queries and one for 64 keys. Factors are applied to the integer sums in the kernel. If not all channels
  of a head are coded, the others are multiplied in 16 bits, read from q and k themselves. For normally distributed inputs
  and 128 channels, the relative error of the output is 1e-2, with half of the channels coded 6.6e-3; with one factor for
  a block of rows, as in SageAttention, it is 1.4e-2, and in bfloat16 2.4e-3.
- Weights and values: multiplied in the dtype of v, with float32 sums. bfloat16 values are not cast to float16: with
  float32 sums both have the same rate, and bfloat16 needs no copy and has no value beyond range.

With bfloat16, a program subtracts the largest score of each query's last tile of keys from all of its scores. This is
as accurate as subtracting the largest score of all as long as the sum of exponentials stays within float32's range (see
`wanduet.kernels.attention.flash4_softmax`), and leaves out the rescaling of sums between tiles. A program with a query
beyond that range starts again, with the largest score so far. float16 has no such range: there it always does so.

Imported lazily, only if Triton is installed.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton reads the annotations of a kernel's parameters itself.)

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanduet.kernels.attention.cross import LOG2_E, weigh
from wanduet.kernels.attention.int8_codes import MAGIC_BITS, encode
from wanduet.kernels.device import WGMMA_SHARED_MEMORY, on_device_of, shared_memory

CHANNELS = (32, 64, 128)
LARGEST_SUM = tl.constexpr(2.0**96)  # of a query's exponentials; as in flash4_softmax


@dataclass(frozen=True, slots=True)
class Tile:
    """Tile of a program: its queries, and keys at a time. `registers`: at most so many of a thread."""

    queries: int = 128
    keys: int = 64
    warps: int = 8
    stages: int = 3
    registers: int | None = None


@dataclass(frozen=True, slots=True)
class Blocks:
    """Which blocks of keys each block of queries attends to.

    `index` `[B, H, M, N]` int32: for each block of queries, the blocks of keys, of which the first `count` `[B, H, M]`
    int32 are used. A block of queries without keys gives zeros and a log-sum-exp of minus infinity. `queries` and
    `keys`: sizes of the blocks; the last ones may be shorter.
    """

    count: Tensor
    index: Tensor
    queries: int = 128
    keys: int = 64


def tile_for(itemsize: int, limit: int, blocks: Blocks | None = None) -> Tile:
    """Return the tile for inputs of `itemsize` bytes a value. `limit`: bytes of shared memory of a program.

    The tile for at most 99 KiB keeps every value in a register, as compiled for 8.0 to 12.0
    (benchmarks/compile_ahead.py). Hopper's was the fastest of six on an H200 (benchmarks/results/attention_8bit.json):
    with fewer registers than it wants, two programs run on a multiprocessor.
    Blocks of queries that are not of whole tiles get tiles of half the size.
    """
    if itemsize == 4:
        return Tile(64, 32, 4, 2)
    tile = Tile(128, 32, 8, 4, registers=128 if limit >= WGMMA_SHARED_MEMORY else None)
    if blocks is not None and blocks.queries % tile.queries != 0:
        return replace(tile, queries=tile.queries // 2, warps=tile.warps // 2)
    return tile


@triton.jit  # type: ignore[untyped-decorator]
def _tile(index_ptr, step, num_blocks, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """Return the first key of a tile, and the number of keys from there to the end of its block; `BLOCK`: 0 for all."""
    first, left = step * KEYS, KEYS
    if BLOCK != 0:
        tiles = tl.cdiv(BLOCK, KEYS)
        block = tl.load(index_ptr + step // tiles, step // tiles < num_blocks, 0)
        left = BLOCK - step % tiles * KEYS
        first = (block + 1) * BLOCK - left
    return first, left


@triton.jit  # type: ignore[untyped-decorator]
def _rows(x_ptr, x_row, start, num_keys, FIRST: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr, MASK: tl.constexpr):
    """Load a tile of keys or values, from channel `FIRST` on; `MASK`: some may be beyond the last."""
    key = tl.arange(0, KEYS)
    at = x_ptr + tl.cast(start, tl.int64) * x_row + key[:, None] * x_row + FIRST + tl.arange(0, D - FIRST)[None, :]
    if MASK:
        return tl.load(at, (start + key < num_keys)[:, None], 0.0)
    else:  # noqa: RET505
        return tl.load(at)


@triton.jit  # type: ignore[untyped-decorator]
def _scores(
    q_codes, q_scale, q, shift, k_codes_ptr, k_scale_ptr, k_extra_ptr, k_ptr, k_row, start, left, num_keys,
    C: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Return the scores of the queries with a tile of keys, less `shift`; minus infinity beyond the last key."""
    key = tl.arange(0, KEYS)
    codes = tl.load(k_codes_ptr + tl.cast(start, tl.int64) * C + key[:, None] * C + tl.arange(0, C)[None, :])
    scale = tl.load(k_scale_ptr + start + key)
    extra = tl.load(k_extra_ptr + start + key)
    sums = tl.dot(q_codes, tl.trans(codes))
    scores = (sums + MAGIC_BITS).to(tl.float32, bitcast=True) * scale[None, :] + extra[None, :]
    if C == D:
        scores = scores * q_scale[:, None] - shift[:, None]
    else:
        k = tl.trans(_rows(k_ptr, k_row, start, num_keys, C, D, KEYS, MASK))
        # Not added to the first product as it is computed: that was slower on an H200 with any tile.
        rest = tl.dot(q, k, tl.zeros_like(scores) - shift[:, None], input_precision="ieee")
        scores = tl.fma(scores, tl.broadcast_to(q_scale[:, None], scores.shape), rest)
    if BLOCK % KEYS != 0:
        scores = tl.where((key < left)[None, :], scores, -float("inf"))
    return scores


@triton.jit(do_not_specialize=["length", "num_keys"])  # type: ignore[untyped-decorator]
def _attend_kernel(
    q_codes_ptr, q_scale_ptr, q_extra_ptr, k_codes_ptr, k_scale_ptr, k_extra_ptr,
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, count_ptr, index_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row, out_head,
    length, num_keys, q_padded, k_padded, lists, list_length, scale, LOG2_E: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STEADY: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute a tile of one head's queries.

    `C` of `D` channels are coded. `scale`: log2(e) / sqrt(D). `STEADY`: subtract the last tile's largest score.
    `KEY_BLOCK`: keys of a block in a list; 0 attends to all keys.
    """
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    at_head = batch * tl.num_programs(1) + head
    q_codes_ptr += at_head * q_padded * C
    k_codes_ptr += at_head * k_padded * C
    k_scale_ptr += at_head * k_padded
    k_extra_ptr += at_head * k_padded
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    out_ptr += batch * out_batch + head * out_head
    first, end = tl.program_id(0) * QUERIES, length
    num_blocks, steps = 0, tl.cdiv(num_keys, KEYS)
    if KEY_BLOCK != 0:
        tiles = tl.cdiv(QUERY_BLOCK, QUERIES)
        block = tl.program_id(0) // tiles
        first = block * QUERY_BLOCK + tl.program_id(0) % tiles * QUERIES
        end = tl.minimum(length, (block + 1) * QUERY_BLOCK)
        num_blocks = tl.load(count_ptr + at_head * lists + block)
        index_ptr += (at_head * lists + block) * list_length
        steps = num_blocks * tl.cdiv(KEY_BLOCK, KEYS)
    row = first + tl.arange(0, QUERIES)
    is_row = row < end
    row_i64 = row.to(tl.int64)[:, None]
    channel = tl.arange(0, D)
    q_codes = tl.load(q_codes_ptr + row_i64 * C + tl.arange(0, C)[None, :], is_row[:, None], 0)
    q_scale = tl.load(q_scale_ptr + at_head * q_padded + row, is_row, 1.0)
    if C < D:
        q = tl.load(q_ptr + row_i64 * q_row + C + tl.arange(0, D - C)[None, :], is_row[:, None], 0.0)
        q = (q.to(tl.float32) * scale).to(q_ptr.dtype.element_ty)
    else:
        q = q_codes

    none = tl.zeros((QUERIES,), tl.float32)
    highest = none
    total = none
    out = tl.zeros((QUERIES, D), tl.float32)
    again = True
    if STEADY:
        # The last tile first: all others are whole, unless they are of lists.
        tail = tl.maximum(steps - 1, 0)
        start, left = _tile(index_ptr, tail, num_blocks, KEY_BLOCK, KEYS)
        scores = _scores(
            q_codes, q_scale, q, none, k_codes_ptr, k_scale_ptr, k_extra_ptr, k_ptr, k_row, start, left, num_keys,
            C, D, KEYS, KEY_BLOCK, True,
        )  # fmt: skip
        highest = tl.max(scores, 1)
        weights = tl.exp2(tl.where(steps > 0, scores - highest[:, None], -float("inf")))
        total = tl.sum(weights, 1)
        v = _rows(v_ptr, v_row, start, num_keys, 0, D, KEYS, True)
        out = tl.dot(weights.to(v.dtype), v, out, input_precision="ieee")
        for step in range(tail):
            start, left = _tile(index_ptr, step, num_blocks, KEY_BLOCK, KEYS)
            scores = _scores(
                q_codes, q_scale, q, highest, k_codes_ptr, k_scale_ptr, k_extra_ptr, k_ptr, k_row, start, left, num_keys,
                C, D, KEYS, KEY_BLOCK, KEY_BLOCK != 0,
            )  # fmt: skip
            v = _rows(v_ptr, v_row, start, num_keys, 0, D, KEYS, KEY_BLOCK != 0)
            weights = tl.exp2(scores)
            total += tl.sum(weights, 1)
            out = tl.dot(weights.to(v.dtype), v, out, input_precision="ieee")
        again = tl.max(tl.where(total < LARGEST_SUM, 0, 1), 0) > 0  # also if a sum is NaN
    if again:
        highest = tl.full((QUERIES,), -float("inf"), tl.float32)
        total = none
        out = tl.zeros((QUERIES, D), tl.float32)
        for step in range(steps):
            start, left = _tile(index_ptr, step, num_blocks, KEY_BLOCK, KEYS)
            scores = _scores(
                q_codes, q_scale, q, none, k_codes_ptr, k_scale_ptr, k_extra_ptr, k_ptr, k_row, start, left, num_keys,
                C, D, KEYS, KEY_BLOCK, True,
            )  # fmt: skip
            v = _rows(v_ptr, v_row, start, num_keys, 0, D, KEYS, True)
            highest, total, out = weigh(scores, v, highest, total, out)

    out = out / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(out_ptr + row_i64 * out_row + channel[None, :], out.to(out_ptr.dtype.element_ty), is_row[:, None])
    extra = tl.load(q_extra_ptr + at_head * q_padded + row, is_row, 0.0)
    tl.store(lse_ptr + at_head * length + row, (highest + tl.log2(total) + extra) / LOG2_E, is_row)


def attend(
    q: Tensor, k: Tensor, v: Tensor, channels: int, blocks: Blocks | None = None, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return attention `[B, L, H, D]` and the log-sum-exp `[B, H, L]` float32 (natural logarithm).

    `q` `[B, L, H, D]`, `k` and `v` `[B, S, H, D]`, of one dtype, with contiguous channels of a head; they are not
    changed. D is 32, 64 or 128. `channels`: how many of a head's channels, the first ones, are multiplied in 8 bits: one
    of these numbers, at most D. `blocks`: attend to these blocks of keys only. `tile`: by default that of the device.
    NaN and infinity in the inputs give NaN.

    Raises ValueError for other layouts and sizes.
    """
    batch, length, heads, head_dim = q.shape
    if head_dim not in CHANNELS or channels not in CHANNELS or channels > head_dim:
        raise ValueError(f"8-bit attention is for 32, 64 or 128 channels, not for {channels} of {head_dim}.")
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        raise ValueError("8-bit attention needs the channels of a head side by side in memory.")
    tile = tile or tile_for(q.itemsize, shared_memory(q.device), blocks)
    programs, spare, lists = triton.cdiv(length, tile.queries), 0, (0, 0)
    if blocks is not None:
        lists = (blocks.index.shape[2], blocks.index.shape[3])
        if lists[0] != triton.cdiv(length, blocks.queries) or blocks.index.dtype != torch.int32:
            raise ValueError(f"{lists[0]} lists of {blocks.index.dtype} do not fit {length} queries.")
        programs = lists[0] * triton.cdiv(blocks.queries, tile.queries)
        spare = triton.cdiv(blocks.keys, tile.keys) * tile.keys
    scale = LOG2_E * head_dim**-0.5
    q_codes, k_codes = encode(q, k, channels, scale, spare)
    out, lse = q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=torch.float32)
    count, index = (lse, lse) if blocks is None else (blocks.count.contiguous(), blocks.index.contiguous())
    with on_device_of(q):
        _attend_kernel[(programs, heads, batch)](
            q_codes.codes, q_codes.scale, q_codes.extra, k_codes.codes, k_codes.scale, k_codes.extra,
            q, k, v, out, lse, count, index,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            length, k.shape[1], q_codes.padded, k_codes.padded, *lists, scale, LOG2_E,
            C=channels, D=head_dim, QUERIES=tile.queries, KEYS=tile.keys, STEADY=v.dtype != torch.float16,
            QUERY_BLOCK=blocks.queries if blocks else 0, KEY_BLOCK=blocks.keys if blocks else 0,
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse
