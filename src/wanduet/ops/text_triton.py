"""Attention to the text as one Triton kernel: q is read once, normed, and attends to a few dozen keys.

Imported lazily, only where Triton is there. A prompt has some hundred keys, so the time goes into reading q and
writing the result; a general kernel reads q after another one has normed and written it, and sees all 512 positions
of the padded text, of which most are the same key (see `fused.text_attention`).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton reads the annotations of a kernel's parameters itself.)

from dataclasses import dataclass
from math import log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanduet.ops import fused
from wanduet.ops.devices import on_device_of

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class TextTile:
    """What a program computes: queries x heads, `keys` at a time."""

    queries: int = 64
    keys: int = 64
    heads: int = 12
    warps: int = 4
    stages: int = 2


@triton.jit(do_not_specialize=["length", "num_keys"])  # type: ignore[untyped-decorator]
def _text_attention_kernel(
    q_ptr, weight_ptr, k_ptr, v_ptr, out_ptr,
    q_batch, q_row, k_batch, k_key, v_batch, v_key, out_batch, out_row,
    length, num_keys, eps, scale, last_bias,
    HEADS: tl.constexpr, D: tl.constexpr, PER_PROGRAM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Heads `[PER_PROGRAM]` of `QUERIES` rows. `scale` is log2(e) / sqrt(D), `last_bias` the base-2 logarithm of how
    often the last key counts. Rows are normed over all `HEADS * D` channels."""
    groups: tl.constexpr = HEADS // PER_PROGRAM
    group = tl.program_id(0) % groups
    row = (tl.program_id(0) // groups) * QUERIES + tl.arange(0, QUERIES)
    batch = tl.program_id(1).to(tl.int64)
    is_row = row[:, None] < length
    channel = tl.arange(0, D)
    q_at = q_ptr + batch * q_batch + row.to(tl.int64)[:, None] * q_row + channel[None, :]

    squares = tl.zeros((QUERIES,), tl.float32)
    for head in range(HEADS):
        part = tl.load(q_at + head * D, is_row, 0.0).to(tl.float32)
        squares += tl.sum(part * part, 1)
    factor = tl.rsqrt(squares / (HEADS * D) + eps)[:, None]

    k_ptr += batch * k_batch
    v_ptr += batch * v_batch
    out_at = out_ptr + batch * out_batch + row.to(tl.int64)[:, None] * out_row + channel[None, :]
    for index in range(PER_PROGRAM):
        first = (group * PER_PROGRAM + index) * D
        weight = tl.load(weight_ptr + first + channel).to(tl.float32)[None, :]
        q = (tl.load(q_at + first, is_row, 0.0).to(tl.float32) * factor * weight).to(q_ptr.dtype.element_ty)
        highest = tl.full((QUERIES,), -float("inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        out = tl.zeros((QUERIES, D), tl.float32)
        for start in range(0, num_keys, KEYS):
            key = start + tl.arange(0, KEYS)
            is_key = key[:, None] < num_keys
            k = tl.load(k_ptr + key[:, None] * k_key + first + channel[None, :], is_key, 0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            scores += tl.where(key == num_keys - 1, last_bias, 0.0)[None, :]
            scores = tl.where(key[None, :] < num_keys, scores, -float("inf"))
            higher = tl.maximum(highest, tl.max(scores, 1))
            shrink = tl.exp2(highest - higher)
            weights = tl.exp2(scores - higher[:, None])
            total = total * shrink + tl.sum(weights, 1)
            v = tl.load(v_ptr + key[:, None] * v_key + first + channel[None, :], is_key, 0.0)
            out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
            highest = higher
        tl.store(out_at + first, (out / total[:, None]).to(out_ptr.dtype.element_ty), is_row)


def text_attention(
    q: Tensor, weight: Tensor, eps: float, keys: Tensor, values: Tensor, repeats: int, tile: TextTile | None = None
) -> Tensor:
    """See `fused.text_attention`; in q's memory where a program has all heads of a row, which it reads before it writes."""
    if torch.is_grad_enabled() or keys.shape[3] & (keys.shape[3] - 1):  # a block's sides are powers of two
        return fused.text_attention(q, weight, eps, keys, values, repeats)
    batch, length, _ = q.shape
    _, num_keys, heads, head_dim = keys.shape
    tile = tile or TextTile()
    per_program = tile.heads if heads % tile.heads == 0 else heads
    out = q if per_program == heads else torch.empty_like(q, memory_format=torch.contiguous_format)
    if any(x.stride(-1) != 1 or x.stride(-2) != head_dim for x in (keys, values)) or q.stride(-1) != 1:
        raise ValueError("Attention to the text needs heads and channels that lie side by side in memory.")
    with on_device_of(q):
        _text_attention_kernel[(triton.cdiv(length, tile.queries) * (heads // per_program), batch)](
            q, weight, keys, values, out, q.stride(0), q.stride(1), keys.stride(0), keys.stride(1),
            values.stride(0), values.stride(1), out.stride(0), out.stride(1),
            length, num_keys, eps, LOG2_E * head_dim**-0.5, log2(repeats),
            HEADS=heads, D=head_dim, PER_PROGRAM=per_program, QUERIES=tile.queries, KEYS=tile.keys,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out
