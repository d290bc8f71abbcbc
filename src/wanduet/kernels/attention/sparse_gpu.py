"""Attention by lists of key blocks in Triton, for GPUs on which flash-attn-4 does not read lists.

Imported lazily, only if Triton is installed.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton reads the annotations of a kernel's parameters itself.)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanduet.kernels.attention.cross import LOG2_E, weigh
from wanduet.kernels.attention.flash4_redo import rows_left
from wanduet.kernels.device import on_device_of


@dataclass(frozen=True, slots=True)
class ListTile:
    """Tile of a program: at most `queries` at a time, in all of which it reads `keys` keys at a time."""

    queries: int = 128
    keys: int = 64
    warps: int = 8
    stages: int = 3


def tile_for(itemsize: int, query_size: int) -> ListTile:
    """Return the tile for values of `itemsize` bytes and blocks of `query_size` queries.

    With heads of 128 channels, the default takes 96 KiB of shared memory and keeps its values in registers, as compiled
    for 8.0 to 12.0 (tests/compiled).
    """
    if itemsize == 4:
        return ListTile(64, 32, 4, 2)
    return ListTile() if query_size > 64 else ListTile(queries=64, warps=4)


@triton.jit(do_not_specialize=["length", "num_keys", "entries"])  # type: ignore[untyped-decorator]
def _listed_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, count_ptr, short_ptr, index_ptr, query_starts_ptr, key_starts_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row, out_head,
    length, num_keys, entries, scale, LOG2_E: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, QUERY_SIZE: tl.constexpr, KEY_SIZE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, QUERY_STARTS: tl.constexpr, KEY_STARTS: tl.constexpr,
    ONLY_LEFT: tl.constexpr,
):  # fmt: skip
    """Compute a tile of queries of one head. Programs of a head's tiles are neighbours: they share keys in the cache.

    Blocks that may be shorter are read with a mask: the last entry of a list, since keys are ascending; with KEY_STARTS, the
    first entries, as many as `short_ptr` says. ONLY_LEFT: compute the queries whose log-sum-exp is infinite or NaN.
    """
    TILES: tl.constexpr = (QUERY_SIZE + QUERIES - 1) // QUERIES
    PARTS: tl.constexpr = (KEY_SIZE + KEYS - 1) // KEYS
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    block = tl.program_id(0) // TILES
    if QUERY_STARTS:
        start, stop = tl.load(query_starts_ptr + block), tl.load(query_starts_ptr + block + 1)
    else:
        start = block * QUERY_SIZE
        stop = tl.minimum(start + QUERY_SIZE, length)
    row = start + tl.program_id(0) % TILES * QUERIES + tl.arange(0, QUERIES)
    channel = tl.arange(0, BLOCK)[None, :]
    is_row = row < stop
    lse_ptr += (batch * tl.num_programs(1) + head) * length
    if ONLY_LEFT:
        is_row = rows_left(lse_ptr, row, stop)
        if tl.max(is_row.to(tl.int32), 0) == 0:
            return
    is_read = is_row[:, None] & (channel < D)
    at = row.to(tl.int64)[:, None]
    q = tl.load(q_ptr + batch * q_batch + head * q_head + at * q_row + channel, is_read, 0.0)
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    which = (batch * tl.num_programs(1) + head) * (tl.num_programs(0) // TILES) + block
    count = tl.load(count_ptr + which)
    index_ptr += which * entries
    highest = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    out = tl.zeros((QUERIES, BLOCK), tl.float32)
    start_masked, stop_masked = 0, count * PARTS
    if KEY_SIZE % KEYS == 0:
        if KEY_STARTS:
            stop_masked = tl.load(short_ptr + which) * PARTS
            start_whole, stop_whole = stop_masked, count * PARTS
        else:
            start_masked = tl.maximum(count - 1, 0) * PARTS
            start_whole, stop_whole = 0, start_masked
        for part in range(start_whole, stop_whole):
            key_block = tl.load(index_ptr + part // PARTS)
            first = (tl.load(key_starts_ptr + key_block) if KEY_STARTS else key_block * KEY_SIZE) + part % PARTS * KEYS
            key_at = (first + tl.arange(0, KEYS)).to(tl.int64)[:, None]
            if D == BLOCK:
                k = tl.load(k_ptr + key_at * k_row + channel)
                v = tl.load(v_ptr + key_at * v_row + channel)
            else:
                k = tl.load(k_ptr + key_at * k_row + channel, channel < D, 0.0)
                v = tl.load(v_ptr + key_at * v_row + channel, channel < D, 0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            highest, total, out = weigh(scores, v, highest, total, out)
    for part in range(start_masked, stop_masked):
        key_block = tl.load(index_ptr + part // PARTS)
        if KEY_STARTS:
            first, last = tl.load(key_starts_ptr + key_block), tl.load(key_starts_ptr + key_block + 1)
        else:
            first = key_block * KEY_SIZE
            last = tl.minimum(first + KEY_SIZE, num_keys)
        key = first + part % PARTS * KEYS + tl.arange(0, KEYS)
        is_key = key < last
        key_at = key.to(tl.int64)[:, None]
        there = is_key[:, None] & (channel < D)
        k = tl.load(k_ptr + key_at * k_row + channel, there, 0.0)
        v = tl.load(v_ptr + key_at * v_row + channel, there, 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(is_key[None, :], scores, -float("inf"))
        highest, total, out = weigh(scores, v, highest, total, out)
    total = tl.where(count == 0, 1.0, total)
    out_at = out_ptr + batch * out_batch + head * out_head + at * out_row + channel
    tl.store(out_at, (out / total[:, None]).to(out_ptr.dtype.element_ty), is_read)
    tl.store(lse_ptr + row, (highest + tl.log2(total)) / LOG2_E, is_row)


def attend_listed(q: Tensor, k: Tensor, v: Tensor, lists) -> tuple[Tensor, Tensor]:
    """See `sparse.sparse_attention_with_lse`; `lists` are `sparse.KeyLists`. Raises ValueError for a layout that it cannot read."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    _launch(q, k, v, lists, (out, lse), only_left=False)
    return out, lse


def redo_listed(q: Tensor, k: Tensor, v: Tensor, lists, out: Tensor, lse: Tensor) -> None:
    """Recompute in place the rows of `attend_listed`'s result whose log-sum-exp `[B, H, L]`, contiguous float32, is infinite or
    NaN."""
    _launch(q, k, v, lists, (out, lse), only_left=True)


def _launch(q: Tensor, k: Tensor, v: Tensor, lists, result: tuple[Tensor, Tensor], *, only_left: bool) -> None:
    out, lse = result
    batch, length, heads, head_dim = q.shape
    if any(x.stride(-1) != 1 for x in (q, k, v, out)) or not all(
        x.is_contiguous() for x in (lists.index, lists.count, lse)
    ):
        raise ValueError("Sparse attention needs a head's channels, and the entries of a list, side by side in memory.")
    tile = tile_for(q.itemsize, lists.query_size)
    queries, keys = (
        max(16, min(most, triton.next_power_of_2(size)))
        for most, size in ((tile.queries, lists.query_size), (tile.keys, lists.key_size))
    )
    programs = lists.index.shape[2] * triton.cdiv(lists.query_size, queries)
    with on_device_of(q):
        _listed_kernel[(programs, heads, batch)](
            q, k, v, out, lse, lists.count, lists.short_count(), lists.index,
            *(lists.count if blocks is None else blocks.starts for blocks in (lists.query_blocks, lists.key_blocks)),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            length, k.shape[1], lists.index.shape[3], LOG2_E * head_dim**-0.5, LOG2_E,
            D=head_dim, BLOCK=max(16, triton.next_power_of_2(head_dim)),
            QUERY_SIZE=lists.query_size, KEY_SIZE=lists.key_size, QUERIES=queries, KEYS=keys,
            QUERY_STARTS=lists.query_blocks is not None, KEY_STARTS=lists.key_blocks is not None, ONLY_LEFT=only_left,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
