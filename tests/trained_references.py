"""VSA and SLA straight from their formulas, with a mask of all pairs of tokens. Tensors are `[heads, L, D]`."""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor


def kept_keys(scores: Tensor, kept: int, query_block: Tensor, key_block: Tensor) -> Tensor:
    """Which keys each query reads, `[heads, L, L]`: those of the `kept` key blocks with the best scores `[heads, M, N]`."""
    best = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(kept).indices, True)
    return best[:, query_block][:, :, key_block]


def means(x: Tensor, block: Tensor) -> Tensor:
    """The mean of each block's tokens, `[heads, blocks, D]`, of `x` `[heads, L, D]`."""
    return torch.stack([x[:, block == number].mean(1) for number in range(int(block.max()) + 1)], 1)


def reference_vsa(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, grid: tuple[int, int, int], share: float) -> Tensor:
    """Of `[heads, L, D]` in the order by frame, row and column."""
    places = list(product(*map(range, grid)))
    tiles = sorted({tuple(x // 4 for x in place) for place in places})
    tile = torch.tensor([tiles.index(tuple(x // 4 for x in place)) for place in places])
    scores = means(q, tile) @ means(k, tile).transpose(1, 2) / q.shape[-1] ** 0.5
    coarse = (scores.softmax(-1) @ means(v, tile))[:, tile]
    kept = -(-round(share * len(tiles) * 1000) // 1000)
    unread = ~kept_keys(scores, kept, tile, tile)
    fine = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(unread, -torch.inf).softmax(-1) @ v
    return coarse * gate + fine


def reference_sla(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, share: float) -> Tensor:
    """Of `[heads, L, D]`."""
    token = torch.arange(q.shape[1])
    k_less_mean = k - k.mean(1, keepdim=True)
    scores = means(q, token // 128) @ means(k_less_mean, token // 64).transpose(1, 2)
    unread = ~kept_keys(scores, max(1, int(share * scores.shape[-1])), token // 128, token // 64)
    sparse = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(unread, -torch.inf).softmax(-1) @ v
    fq, fk = q.softmax(-1), k.softmax(-1)
    linear = fq @ (fk.transpose(1, 2) @ v) / (1e-5 + fq @ fk.sum(1)[:, :, None])
    return sparse + F.linear(linear, weight, bias)


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x[0].transpose(0, 1).double() for x in tensors]
