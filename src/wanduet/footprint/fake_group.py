"""A rank's part in a group that is not there: it exchanges with nobody, and asks for the memory that exchanges take.

To find a forward's peak without the others (footprint/dit.py). The first rank's parts are the largest.

Letters in names: B batch, L tokens, H heads, D channels a head.
"""

from typing import cast

import torch
from torch import Tensor
from torch import distributed as dist

from wanduet.distributed.mesh import Layout
from wanduet.distributed.p2p.exchange import direct_exchange
from wanduet.distributed.p2p.memory import PeerMemory
from wanduet.distributed.sequence.cfg import PromptSharding
from wanduet.distributed.sequence.hybrid import HEAD_GROUPS
from wanduet.distributed.sequence.ring import attend_in_turn
from wanduet.distributed.sequence.ulysses import Exchange, HeadExchange
from wanduet.kernels.attention.backends import AttentionFn, AttentionLseFn


class OneOfMany(PromptSharding):
    """The first rank of a layout; with `peers` it would write to others' memory."""

    def __init__(self, layout: Layout, peers: PeerMemory | None) -> None:
        # Ranks of other prompts share a block where the sequence is not shared.
        prompts = layout.cfg if layout.sequence == 1 else 1
        super().__init__(prompts, 0, lambda own: [torch.empty_like(own) for _ in range(prompts)])
        self._layout, self._peers = layout, peers

    def shard_sequence(self, x: Tensor, dim: int) -> Tensor:
        """The largest part."""
        ranks = self._layout.sequence
        return x if ranks == 1 else x.narrow(dim, 0, -(-x.shape[dim] // ranks)).clone()

    def gather_sequence(self, x: Tensor, dim: int) -> Tensor:
        """A whole sequence, of which this part is one."""
        ranks = self._layout.sequence
        return x if ranks == 1 else torch.cat([x] * ranks, dim=dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFn) -> Tensor:
        """With what arrives of the others' tokens."""
        ulysses, ring = self._layout.ulysses, self._layout.ring

        def attend_whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if ring == 1:
                return attention(q, k, v)
            return attend_in_turn(q, k, v, [q.shape[1]] * ring, _with_lse(attention), 0, lambda held, incoming: ())

        if ulysses == 1:
            return attend_whole(q, k, v)
        lengths = (q.shape[1],) * ulysses
        if self._peers is not None:
            return direct_exchange(self._layout, self._peers, lengths, 0).attend(q, k, v, attend_whole)
        unanswered = _Unanswered(cast(dist.ProcessGroup, None), lengths, 0)
        return unanswered.attend(q, k, v, attend_whole, HEAD_GROUPS if ring == 1 else 1)

    def attend_first(self, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFn) -> Tensor:
        """Alone, with the ranks of other prompts, or as in every block."""
        shared = self._ranks > 1
        return super().attend_first(q, k, v, attention) if shared else self.attend(q, k, v, attention)


class NobodysPeers:
    """A `PeerMemory` of one buffer, which stands for everybody's; nothing is copied."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer

    def reserve(self, size: int) -> bool:
        """It is there."""
        return False

    def on(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A part of it."""
        return self._buffer[offset : offset + torch.Size(shape).numel()].view(shape)

    def follow(self) -> None:
        """Nothing."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Nothing."""

    def tell(self, rank: int, channel: int) -> None:
        """Nothing."""

    def hear(self, rank: int, channel: int) -> None:
        """Nothing."""

    def heed(self, rank: int, channel: int) -> None:
        """Nothing."""

    def join(self) -> None:
        """Nothing."""


class _Arrived:
    """A collective that is over."""

    def wait(self) -> None:
        """Nothing."""


class _Unanswered(HeadExchange):
    """Exchanges by collectives, of which none is made."""

    def _exchange(self, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]) -> Exchange:
        return Exchange(sent, sent.new_empty(sum(received_sizes)), cast(dist.Work, _Arrived()))


def _with_lse(attention: AttentionFn) -> AttentionLseFn:
    """With the log-sum-exp, which it keeps to itself."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = attention(q, k, v)
        return out, torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)

    return attend
