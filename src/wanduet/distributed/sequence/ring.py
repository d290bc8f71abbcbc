"""Ring attention: keys and values travel around the ring, queries stay; partial results are merged exactly.

Source: Ring Attention (arXiv 2310.01889); merging by log-sum-exp as in FlashAttention (arXiv 2205.14135).

Letters in names: B batch, L tokens, H heads, D channels of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor
from torch import distributed as dist

from wanduet.distributed.split import rank_slice
from wanduet.kernels.attention.backends import AttentionLseFn
from wanduet.kernels.attention.call import AttentionCall

SendRecv = Callable[[Tensor, Tensor], Sequence[dist.Work]]
"""Starts to send the first tensor to the next rank, and to receive the second from the rank before."""


@dataclass(frozen=True, slots=True)
class RingAttention:
    """Attention over a ring of ranks. `lengths` are their numbers of tokens; this is rank `rank`."""

    lengths: Sequence[int]
    rank: int
    send_recv: SendRecv

    @classmethod
    def from_group(cls, group: dist.ProcessGroup, lengths: Sequence[int]) -> Self:
        """Create it for this rank of `group`."""
        return cls(lengths, dist.get_rank(group), partial(_send_recv, group=group))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention_lse: AttentionLseFn, call: AttentionCall) -> Tensor:
        """Return attention of this rank's queries to all ranks' keys and values; all `[B, L, H, D]` of one dtype.

        `call` describes the attention of these queries to all keys. Partial results are merged in float32; the result
        has the dtype of `q`. The next keys and values arrive while the current ones are attended to; at most two parts
        are in memory.
        """
        size = len(self.lengths)
        kv = torch.stack((k, v))
        merged = _MergedAttention()
        for step in range(size):
            source, last = (self.rank - step) % size, step == size - 1
            next_length = 0 if last else self.lengths[source - 1]
            next_kv = kv.new_empty((2, kv.shape[1], next_length, *kv.shape[3:]))
            works = [] if last else self.send_recv(kv, next_kv)
            if kv.numel() and q.numel():
                own = call.part(key=rank_slice(self.lengths, source).start)
                merged.add(*attention_lse(q, kv[0], kv[1], own))
            for work in works:
                work.wait()
            kv = next_kv
        return merged.result(q)


def _send_recv(kv: Tensor, next_kv: Tensor, group: dist.ProcessGroup) -> list[dist.Work]:
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    # A rank without tokens sends nothing: not every back end supports empty messages.
    operations = [
        dist.P2POp(operation, tensor, group=group, group_peer=(rank + direction) % size)
        for operation, tensor, direction in ((dist.isend, kv, 1), (dist.irecv, next_kv, -1))
        if tensor.numel()
    ]
    works: list[dist.Work] = dist.batch_isend_irecv(operations) if operations else []
    return works


class _MergedAttention:
    """Attention to the keys added so far, `[B, L, H, D]` float32, and its log-sum-exp `[B, H, L]` float32."""

    def __init__(self) -> None:
        self.out: Tensor | None = None
        self.lse: Tensor | None = None

    def add(self, out: Tensor, lse: Tensor) -> None:
        """Merge the attention to further keys. Both are means weighted by softmax; so is the merged result."""
        lse = lse.float()
        if self.out is None or self.lse is None:
            self.out, self.lse = out.float(), lse
            return
        weight = torch.sigmoid(lse - self.lse).transpose(1, 2).unsqueeze(-1)
        self.out = torch.lerp(self.out, out.float(), weight)
        self.lse = torch.logaddexp(self.lse, lse)

    def result(self, like: Tensor) -> Tensor:
        """Return the merged attention in the dtype of `like`; if nothing was added, a new tensor like it."""
        return torch.empty_like(like) if self.out is None else self.out.to(like.dtype)
