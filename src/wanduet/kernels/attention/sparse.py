"""Sparse attention: each block of queries reads the key blocks of a list. The lists may come from anywhere.

Inputs are as in `backends`: q, k, v `[B, L, H, D]` with contiguous channels of a head. On a GPU, Triton's kernel runs
(`sparse_gpu`); `flash4.attend_listed` is faster on Hopper.

Letters in names: B batch, L queries, S keys, H heads, D channels, M blocks of queries, N entries of a list.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

# Tokens of a block of queries, and of keys. flash-attn-4's tile on Hopper; a tile of other kernels divides it.
BLOCK = 128
# Bytes of float32 keys that the plain form gathers at a time.
PLAIN_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Blocks of different sizes: block i is from token `starts[i]` to `starts[i + 1]`, at least one token and at most the size.

    `starts` `[blocks + 1]`: int32, from 0 to the number of tokens. `num_short`: so many of the first blocks may be shorter
    than the size, all others are whole.
    """

    starts: Tensor
    num_short: int


@dataclass(frozen=True, slots=True)
class KeyLists:
    """The key blocks that each block of queries reads.

    `count` `[B, H, M]` and `index` `[B, H, M, N]`, both int32 and contiguous: block m of the queries of a head reads the
    key blocks that the first `count` entries of its row name, each at most once and in ascending order (kernels expect
    the last key block, which may be shorter, at the end). Other entries are ignored. A count of 0 gives zeros.

    Blocks are consecutive tokens, of queries from the first query, and of keys from the first key: `query_size` and
    `key_size` tokens each, and the rest in the last one. With `query_blocks` or `key_blocks`, blocks have different sizes.
    """

    count: Tensor
    index: Tensor
    query_size: int = BLOCK
    key_size: int = BLOCK
    query_blocks: Blocks | None = None
    key_blocks: Blocks | None = None

    def short_count(self) -> Tensor:
        """How many entries of each list name a block that may be short, `[B, H, M]` int32: its first entries; of blocks of one
        size any tensor, as no kernel reads it."""
        if self.key_blocks is None:
            return self.count
        is_short = self.index < self.key_blocks.num_short
        is_entry = torch.arange(self.index.shape[3], device=self.index.device) < self.count[..., None]
        return (is_short & is_entry).sum(dim=-1, dtype=torch.int32)


ListedFn: TypeAlias = Callable[[Tensor, Tensor, Tensor, KeyLists], tuple[Tensor, Tensor]]


def sparse_attention_with_lse(q: Tensor, k: Tensor, v: Tensor, lists: KeyLists) -> tuple[Tensor, Tensor]:
    """Return attention `[B, L, H, D]` of each query to the keys that its list names, by any kernel that runs here, and the
    natural logarithm of each query's sum of exponentials, `[B, H, L]` float32.

    With gradients, the plain form runs, through which they pass.
    """
    if runs_triton(q):
        from wanduet.kernels.attention import sparse_gpu

        return sparse_gpu.attend_listed(q, k, v, lists)
    return plain_listed(q, k, v, lists)


def runs_triton(x: Tensor) -> bool:
    """Return whether Triton's kernels take a tensor: on a GPU, without gradients, if Triton is installed."""
    return x.device.type == "cuda" and not torch.is_grad_enabled() and importlib.util.find_spec("triton") is not None


def block_tokens(
    length: int, size: int, blocks: Blocks | None, device: torch.device | str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the tokens of each block, `[blocks, size]`, and whether they exist; those that do not are repeated."""
    uniform = torch.arange(0, length + size, size, device=device).clamp(max=length)
    starts = uniform if blocks is None else blocks.starts
    token = starts[:-1, None].long() + torch.arange(size, device=device)
    last = starts[1:, None].long()
    return torch.minimum(token, last - 1), token < last


def plain_listed(q: Tensor, k: Tensor, v: Tensor, lists: KeyLists) -> tuple[Tensor, Tensor]:
    """See `sparse_attention_with_lse`. By the definition, in float32, some blocks of queries at a time."""
    query_at, is_query = block_tokens(q.shape[1], lists.query_size, lists.query_blocks, q.device)
    key_at, is_key = block_tokens(k.shape[1], lists.key_size, lists.key_blocks, k.device)
    q_BHMTD = q.transpose(1, 2)[:, :, query_at].float() * q.shape[-1] ** -0.5
    k_BHNTD, v_BHNTD = (x.transpose(1, 2)[:, :, key_at].float() for x in (k, v))
    batch, heads, entries = q.shape[0], q.shape[2], lists.index.shape[3]
    b = torch.arange(batch, device=q.device)[:, None, None, None]
    h = torch.arange(heads, device=q.device)[:, None, None]
    is_listed = torch.arange(entries, device=q.device) < lists.count[..., None]
    index = torch.where(is_listed, lists.index.long(), 0)
    chunk = max(1, PLAIN_BYTES // max(1, 4 * batch * heads * entries * lists.key_size * q.shape[-1]))
    outs, lses = [], []
    for start in range(0, index.shape[2], chunk):
        blocks = slice(start, start + chunk)
        which = index[:, :, blocks]
        unread = ~(is_key[which] & is_listed[:, :, blocks, :, None]).flatten(3)[..., None, :]
        keys, values = (x[b, h, which].flatten(3, 4) for x in (k_BHNTD, v_BHNTD))
        scores = (q_BHMTD[:, :, blocks] @ keys.transpose(-1, -2)).masked_fill(unread, -torch.inf)
        lses.append(scores.logsumexp(dim=-1))
        highest = lses[-1][..., None].clamp(min=torch.finfo(torch.float32).min)  # of a list without entries: -inf
        outs.append((scores - highest).exp() @ values)
    rows = is_query.flatten()
    out = torch.cat(outs, dim=2).flatten(2, 3)[:, :, rows].transpose(1, 2).to(q.dtype)
    return out, torch.cat(lses, dim=2).flatten(2, 3)[:, :, rows]
