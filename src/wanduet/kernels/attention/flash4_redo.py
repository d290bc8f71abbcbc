"""Triton kernel that recomputes attention for the queries whose sums exceeded float32's range.

`wanduet.kernels.attention.flash4` launches it after a kernel that does not prevent this (see
`wanduet.kernels.attention.flash4_softmax`). Such queries are very rare, so the important time is that of a program
which detects that it has nothing to do.

Imported lazily, only if Triton is installed.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton reads the annotations of a kernel's parameters itself.)

import triton
import triton.language as tl
from torch import Tensor

from wanduet.kernels.attention.cross import LOG2_E, weigh
from wanduet.kernels.device import on_device_of

QUERIES, KEYS = 64, 64  # at a time
LOOKED_AT = 1024  # queries that a program checks: most programs only check, and fewer programs take less time


@triton.jit(do_not_specialize=["length", "num_keys"])  # type: ignore[untyped-decorator]
def _redo_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row, out_head,
    length, num_keys, scale, LOG2_E: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, LOOKED_AT: tl.constexpr,
):  # fmt: skip
    """Recompute those of `LOOKED_AT` queries of one head whose log-sum-exp is not finite."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    lse_ptr += (batch * tl.num_programs(1) + head) * length
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    out_ptr += batch * out_batch + head * out_head
    first = tl.program_id(0) * LOOKED_AT
    last = tl.minimum(first + LOOKED_AT, length)
    if _any_left(lse_ptr, first, last, LOOKED_AT):
        for start in range(first, last, QUERIES):
            if _any_left(lse_ptr, start, last, QUERIES):
                _redo_rows(
                    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_row, k_row, v_row, out_row,
                    start, last, num_keys, scale, LOG2_E, D, BLOCK, QUERIES, KEYS,
                )  # fmt: skip


@triton.jit
def rows_left(lse_ptr, row, last):
    """Return a mask of the rows whose log-sum-exp is infinite or NaN."""
    return (tl.abs(tl.load(lse_ptr + row, row < last, 0.0)) < float("inf")) == 0


@triton.jit  # type: ignore[untyped-decorator]
def _any_left(lse_ptr, start, last, ROWS: tl.constexpr):
    return tl.max(rows_left(lse_ptr, start + tl.arange(0, ROWS), last).to(tl.int32), 0) > 0


@triton.jit  # type: ignore[untyped-decorator]
def _redo_rows(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_row, k_row, v_row, out_row,
    start, last, num_keys, scale, LOG2_E: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row = start + tl.arange(0, QUERIES)
    left = rows_left(lse_ptr, row, last)
    channel = tl.arange(0, BLOCK)[None, :]
    is_channel = channel < D
    mask = left[:, None] & is_channel
    at = row.to(tl.int64)[:, None]
    q = tl.load(q_ptr + at * q_row + channel, mask, 0.0)
    highest = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    out = tl.zeros((QUERIES, BLOCK), tl.float32)
    for first_key in range(0, num_keys, KEYS):
        key = first_key + tl.arange(0, KEYS)
        is_key = key < num_keys
        key_at = key.to(tl.int64)[:, None]
        there = is_key[:, None] & is_channel
        k = tl.load(k_ptr + key_at * k_row + channel, there, 0.0)
        v = tl.load(v_ptr + key_at * v_row + channel, there, 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(is_key[None, :], scores, -float("inf"))
        highest, total, out = weigh(scores, v, highest, total, out)
    tl.store(out_ptr + at * out_row + channel, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask)
    tl.store(lse_ptr + row, (highest + tl.log2(total)) / LOG2_E, left)


def redo(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """Recompute in place the rows of `out` `[B, L, H, D]` and `lse` `[B, H, L]` whose log-sum-exp is infinite or NaN.

    `q` `[B, L, H, D]`, `k` and `v` `[B, S, H, D]`; the channels of a head are contiguous in all. `lse` is contiguous,
    in float32. Scores that are NaN give NaN again. Raises ValueError for another layout.
    """
    batch, length, heads, head_dim = q.shape
    if any(x.stride(-1) != 1 for x in (q, k, v, out)) or not lse.is_contiguous():
        raise ValueError("Attention is computed again where a head's channels lie side by side in memory.")
    with on_device_of(q):
        _redo_kernel[(triton.cdiv(length, LOOKED_AT), heads, batch)](
            q, k, v, out, lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            length, k.shape[1], LOG2_E * head_dim**-0.5, LOG2_E,
            D=head_dim, BLOCK=max(16, triton.next_power_of_2(head_dim)), QUERIES=QUERIES, KEYS=KEYS, LOOKED_AT=LOOKED_AT,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
