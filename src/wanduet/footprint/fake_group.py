"""A fake process group for memory tracing: it allocates what exchanges between ranks allocate, and sends nothing.

With it the peak memory of a forward on one rank is traced without the other ranks (footprint/dit.py). It stands for the
first rank, whose part of the sequence is the largest.

Letters in names: B batch, L tokens, H heads, D channels of a head.
"""

from typing import cast

import torch
from torch import Tensor
from torch import distributed as dist

from wanduet.distributed.mesh import Layout
from wanduet.distributed.p2p.exchange import p2p_exchange
from wanduet.distributed.p2p.memory import PeerMemory
from wanduet.distributed.sequence.cfg import CfgSharding
from wanduet.distributed.sequence.hybrid import HEAD_GROUPS
from wanduet.distributed.sequence.ring import RingAttention
from wanduet.distributed.sequence.ulysses import PendingAllToAll, UlyssesAttention
from wanduet.kernels.attention.backends import AttentionFn, AttentionLseFn
from wanduet.kernels.attention.call import AttentionCall


class TracedSharding(CfgSharding):
    """A `Sharding` for the first rank of a layout without the other ranks.

    With `memory` (a `FakePeerMemory`) it exchanges as GPUs with peer access do, without it by collectives.
    """

    def __init__(self, layout: Layout, memory: PeerMemory | None) -> None:
        # Ranks of different prompts share the first block's attention only if the sequence is not split.
        prompts = layout.cfg if layout.sequence == 1 else 1
        super().__init__(prompts, 0, lambda own: [torch.empty_like(own) for _ in range(prompts)])
        self._layout, self._memory = layout, memory
        self._length = 0  # of the sequence that was sharded last

    def shard_sequence(self, x: Tensor, dim: int) -> Tensor:
        """Return the largest part of `x`."""
        ranks, self._length = self._layout.sequence, x.shape[dim]
        return x if ranks == 1 else x.narrow(dim, 0, -(-x.shape[dim] // ranks)).clone()

    def gather_sequence(self, x: Tensor, dim: int) -> Tensor:
        """Return a whole sequence made of copies of the part `x`."""
        ranks = self._layout.sequence
        return x if ranks == 1 else torch.cat([x] * ranks, dim=dim).narrow(dim, 0, self._length)

    def gather_heads(self, x: Tensor, dim: int) -> Tensor:
        """Return a tensor for all heads made of copies of `x`."""
        return x if self._layout.ulysses == 1 else torch.cat([x] * self._layout.ulysses, dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFn, call: AttentionCall) -> Tensor:
        """Run `attention` on tensors of the shapes that the exchanges give; the values mean nothing."""
        ulysses, ring = self._layout.ulysses, self._layout.ring

        def local_attention(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
            if ring == 1:
                return attention(q, k, v, call)
            ranks = RingAttention([q.shape[1]] * ring, 0, lambda kv, next_kv: ())
            return ranks.attend(q, k, v, _with_lse(attention), call)

        if ulysses == 1:
            return local_attention(q, k, v, call)
        lengths = (q.shape[1],) * ulysses
        if self._memory is not None:
            return p2p_exchange(self._layout, self._memory, lengths, 0).attend(q, k, v, local_attention, call)
        by_collectives = _FakeUlysses(cast(dist.ProcessGroup, None), lengths, 0)
        return by_collectives.attend(q, k, v, local_attention, call, HEAD_GROUPS if ring == 1 else 1)

    def attend_first_block(
        self, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFn, call: AttentionCall
    ) -> Tensor:
        """Share the heads with ranks of other prompts if the layout does; otherwise `attend`."""
        attend = super().attend_first_block if self._ranks > 1 else self.attend
        return attend(q, k, v, attention, call)


class FakePeerMemory:
    """A `PeerMemory` of one buffer, which stands for every rank's; copies and signals do nothing."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer

    def reserve(self, size: int) -> bool:
        """Return False: the buffer exists."""
        return False

    def buffer(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a view of the one buffer."""
        return self._buffer[offset : offset + torch.Size(shape).numel()].view(shape)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Do nothing."""

    def signal(self, rank: int, channel: int) -> None:
        """Do nothing."""

    def wait(self, rank: int, channel: int) -> None:
        """Do nothing."""

    def copy_wait(self, rank: int, channel: int) -> None:
        """Do nothing."""

    def copy_wait_compute(self) -> None:
        """Do nothing."""

    def wait_copies(self) -> None:
        """Do nothing."""


class _FinishedWork:
    """A `dist.Work` of a collective that is done."""

    def wait(self) -> None:
        """Return at once."""


class _FakeUlysses(UlyssesAttention):
    """Ulysses whose all-to-all allocates and sends nothing."""

    def _all_to_all(self, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]) -> PendingAllToAll:
        return PendingAllToAll(sent, sent.new_empty(sum(received_sizes)), cast(dist.Work, _FinishedWork()))


def _with_lse(attention: AttentionFn) -> AttentionLseFn:
    """Return `attention` with a log-sum-exp of its own, allocated and not initialised."""

    def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
        out = attention(q, k, v, call)
        return out, torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)

    return attend
