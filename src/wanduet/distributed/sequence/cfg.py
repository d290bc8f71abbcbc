"""Ranks that take a prompt each, and share the work that does not depend on it.

Until a block has attended to its text, ranks with the same latents compute the same. Most of that is the first
block's self-attention: each rank does some of its heads, and gives the others the result. Heads are independent of
each other, so that every bit is as if each had done all.

Letters in names: B batch, L tokens, R ranks, H heads of one, D channels a head.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import torch
from torch import Tensor
from torch import distributed as dist

from wanduet.distributed.collectives import gather
from wanduet.distributed.sequence.sharding import NoSharding
from wanduet.kernels.attention.backends import AttentionFn

# Tokens are exchanged in this many parts, so that what is received needs little memory before it is put in place.
PARTS = 8

Gather = Callable[[Tensor], Sequence[Tensor]]
"""Every rank's tensor, of the shape of this one's."""


class PromptSharding(NoSharding):
    """A `Sharding` for rank `rank` of `ranks`, each with the whole sequence and another prompt.

    All of them must make the same calls in the same order. For inference.
    """

    def __init__(self, ranks: int, rank: int, gather: Gather) -> None:
        self._ranks, self._rank, self._gather = ranks, rank, gather

    @classmethod
    def of_group(cls, group: dist.ProcessGroup) -> Self:
        """The ranks of a group."""
        return cls(dist.get_world_size(group), dist.get_rank(group), partial(gather, group=group))

    def attend_first(self, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFn) -> Tensor:
        """Plain attention, of which this rank does its part of the heads (all, where they do not divide)."""
        heads = q.shape[2] // self._ranks
        if heads * self._ranks != q.shape[2]:
            return attention(q, k, v)
        mine = slice(self._rank * heads, (self._rank + 1) * heads)
        own_BLHD = attention(q[:, :, mine], k[:, :, mine], v[:, :, mine])
        out_BLRHD = torch.empty(q.shape, dtype=q.dtype, device=q.device).unflatten(2, (self._ranks, heads))
        length = -(-q.shape[1] // PARTS)
        for own, out in zip(own_BLHD.split(length, dim=1), out_BLRHD.split(length, dim=1), strict=True):
            for rank, part in enumerate(self._gather(own)):
                out[:, :, rank] = part
        return out_BLRHD.flatten(2, 3)
