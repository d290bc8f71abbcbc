"""Lists of key blocks for `sparse`, chosen by moments of the queries and keys of each block, without training.

Each block of queries of a head keeps a fixed share of the key blocks, those of the highest scores, as in SpargeAttn (arXiv
2502.18137). Its score is mean q times mean k. (Its keys are first reduced by their mean over all tokens. That changes all
scores of a row by the same number, so not their order.) Here, the score is the mean over a block's queries of the logarithm
of the key block's sum of exponentials, to second order:

    score(m, n) = log(keys in n) + mean q * mean k / sqrt(D) + mean(q^2) * variance(k) / (2 D)

so that blocks of unlike keys, some of which may match, count for more; SpargeAttn always keeps such blocks. On the miniature,
a sixth less of the attention is missed at half the keys than by means alone.

A row depends on its own queries and on the keys only: ranks that compute some heads, or some blocks of queries, choose
the same blocks bit for bit.

Letters in names: B batch, L tokens, H heads, D channels, M blocks of queries, N blocks of keys.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wanduet.family.sparsity import kept_blocks
from wanduet.kernels.attention.sparse import BLOCK, KeyLists, runs_triton


def pooled_lists(q: Tensor, k: Tensor, share: float, block: int = BLOCK, first_query: int = 0) -> KeyLists:
    """Return lists of the share (0..1) of key blocks with the highest scores, at least one; `block` tokens a block.

    `q` `[B, L, H, D]` are the queries from token `first_query` on, `k` `[B, S, H, D]` the keys of all tokens. The key
    blocks of a block's own tokens are always kept.
    """
    scale = q.shape[-1] ** -0.5
    q_moments = block_moments(q, block, Moments(scale, scale**2 / 2))
    scores = block_scores(q_moments, block_moments(k, block, Moments(centred=True)))
    if rest := k.shape[1] % block:
        scores[..., -1] += math.log(rest / block)
    own = [first_query // block, *([first_query // block + 1] if first_query % block else [])]
    for offset in own:
        if offset < scores.shape[-1]:
            scores.diagonal(offset, -2, -1).fill_(torch.inf)
    kept = max(kept_blocks(share, scores.shape[-1]), min(len(own), scores.shape[-1]))
    return KeyLists(*highest_blocks(scores, kept), block, block)


@dataclass(frozen=True, slots=True)
class Moments:
    """Factors of the mean and of the mean square of each channel; with `centred`, of the variance in its place."""

    mean: float = 1.0
    square: float = 1.0
    centred: bool = False


def block_moments(x: Tensor, size: int, moments: Moments) -> Tensor:
    """Return the mean and the second moment of each block of `size` tokens of `x` `[B, L, H, D]`, one behind the other:
    `[B, H, M, 2 * D]` float32."""
    if runs_triton(x):
        from wanduet.kernels.attention import key_lists_gpu

        return key_lists_gpu.block_moments(x, size, (moments.mean, moments.square, moments.centred))
    mean, square = pool_blocks(x, size), pool_blocks(x.float() ** 2, size)
    if moments.centred:
        square = square - mean**2
    return torch.cat((mean * moments.mean, square * moments.square), dim=-1)


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
    """Return the products `[B, H, M, N]` float32 of `[B, H, M, D]` and `[B, H, N, D]`, both float32 and contiguous."""
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
