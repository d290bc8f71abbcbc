"""CFG parallelism: each rank takes one prompt, and ranks share the work that does not depend on the prompt.

Until the first block's cross-attention, ranks with the same latents compute the same values. Most of that work is the
first block's self-attention: each rank computes some of the heads and sends the result to the others. Heads are
independent of each other, so that the result equals, bit for bit, that of a rank which computes all of them.

Letters in names: B batch, L tokens, R ranks, H heads of one rank, D channels of a head.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import torch
from torch import Tensor
from torch import distributed as dist

from wanduet.distributed.collectives import all_gather
from wanduet.distributed.sequence.sharding import NoSharding
from wanduet.kernels.attention.backends import AttentionFn
from wanduet.kernels.attention.call import AttentionCall

# The result is gathered in this many chunks of tokens, so that the receive buffers stay small.
CHUNKS = 8

AllGather = Callable[[Tensor], Sequence[Tensor]]
"""Returns every rank's tensor, in rank order; all have the argument's shape."""


class CfgSharding(NoSharding):
    """A `Sharding` for rank `rank` of `ranks`, each of which has the whole sequence and a prompt of its own.

    All ranks must make the same calls in the same order. For inference only.
    """

    def __init__(self, ranks: int, rank: int, gather: AllGather) -> None:
        self._ranks, self._rank, self._gather = ranks, rank, gather

    @classmethod
    def from_group(cls, group: dist.ProcessGroup) -> Self:
        """Create the sharding for this rank of `group`."""
        return cls(dist.get_world_size(group), dist.get_rank(group), partial(all_gather, group=group))

    def attend_first_block(
        self, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFn, call: AttentionCall
    ) -> Tensor:
        """Return `attention(q, k, v, call)`, of which this rank computes its share of the heads.

        If the number of ranks does not divide the heads, every rank computes all of them.
        """
        heads = q.shape[2] // self._ranks
        if heads * self._ranks != q.shape[2]:
            return attention(q, k, v, call)
        mine = slice(self._rank * heads, (self._rank + 1) * heads)
        own_BLHD = attention(q[:, :, mine], k[:, :, mine], v[:, :, mine], call.part(head=mine.start))
        out_BLRHD = torch.empty(q.shape, dtype=q.dtype, device=q.device).unflatten(2, (self._ranks, heads))
        length = -(-q.shape[1] // CHUNKS)
        for own, out in zip(own_BLHD.split(length, dim=1), out_BLRHD.split(length, dim=1), strict=True):
            for rank, chunk in enumerate(self._gather(own)):
                out[:, :, rank] = chunk
        return out_BLRHD.flatten(2, 3)
