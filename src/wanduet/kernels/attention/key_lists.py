"""Lists of key blocks for `sparse`, chosen by the mean query and the mean key of each block, without training.

Source: SpargeAttn (arXiv 2502.18137), in its form with a fixed share of blocks: score(m, n) = mean q of block m times
mean k of block n, and each block of queries of a head keeps the blocks of the highest scores. (Its keys are first
reduced by their mean over all tokens. That changes all scores of a row by the same number, so not their order.)

A row depends on its own queries and on the keys only: ranks that compute some heads, or some blocks of queries, choose
the same blocks bit for bit.

Letters in names: B batch, L tokens, H heads, D channels, M blocks of queries, N blocks of keys.
"""

import math

import torch
from torch import Tensor

from wanduet.family.sparsity import kept_blocks
from wanduet.kernels.attention.sparse import BLOCK, KeyLists, runs_triton


def pooled_lists(q: Tensor, k: Tensor, share: float, block: int = BLOCK, first_query: int = 0) -> KeyLists:
    """Return lists of the share (0..1) of key blocks with the highest scores, at least one; `block` tokens a block.

    `q` `[B, L, H, D]` are the queries from token `first_query` on, `k` `[B, S, H, D]` the keys of all tokens. The key
    blocks of a block's own tokens are always kept.
    """
    scores = block_scores(pool_blocks(q, block), pool_blocks(k, block))
    own = [first_query // block, *([first_query // block + 1] if first_query % block else [])]
    for offset in own:
        if offset < scores.shape[-1]:
            scores.diagonal(offset, -2, -1).fill_(torch.inf)
    kept = max(kept_blocks(share, scores.shape[-1]), min(len(own), scores.shape[-1]))
    return KeyLists(*highest_blocks(scores, kept), block, block)


def pool_blocks(x: Tensor, size: int, starts: Tensor | None = None) -> Tensor:
    """Return the mean of each block of tokens of `x` `[B, L, H, D]`, `[B, H, M, D]` float32.

    Blocks are as in `KeyLists`: of `size` tokens, or from `starts`.
    """
    if runs_triton(x):
        from wanduet.kernels.attention import key_lists_gpu

        return key_lists_gpu.pool_blocks(x, size, starts)
    token = torch.arange(x.shape[1], device=x.device)
    blocks = math.ceil(x.shape[1] / size) if starts is None else starts.shape[0] - 1
    block = token // size if starts is None else torch.searchsorted(starts[1:].long(), token, right=True)
    sums = x.new_zeros((x.shape[0], blocks, *x.shape[2:]), dtype=torch.float32).index_add(1, block, x.float())
    counts = sums.new_zeros(blocks).index_add(0, block, torch.ones_like(token, dtype=torch.float32))
    return (sums / counts[:, None, None]).transpose(1, 2)


def block_scores(q: Tensor, k: Tensor) -> Tensor:
    """Return the products `[B, H, M, N]` float32 of means `[B, H, M, D]` and `[B, H, N, D]` float32."""
    if runs_triton(q):
        from wanduet.kernels.attention import key_lists_gpu

        return key_lists_gpu.block_scores(q, k)
    return q @ k.transpose(-1, -2)


def highest_blocks(scores: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Return count `[B, H, M]` and index `[B, H, M, kept]`, int32, of the `kept` highest scores of each row of `scores`
    `[B, H, M, N]` float32, in ascending order of their columns. Of equal scores, the first columns count as higher."""
    count = torch.full(scores.shape[:3], kept, dtype=torch.int32, device=scores.device)
    if runs_triton(scores):
        from wanduet.kernels.attention import key_lists_gpu

        return count, key_lists_gpu.highest_blocks(scores, kept)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return count, order[..., :kept].sort(dim=-1).values.int()
