"""Sequence parallelism over several ranks: Ulysses, ring attention, or both. Exact, for any length.

Where ranks can write to each other's memory, p2p/exchange.py exchanges keys and values, or heads; otherwise, collectives
exchange heads.

Every rank has a run of consecutive tokens. Nothing is padded: lengths differ by a token where the number of ranks does
not divide the sequence, or are in proportion to the ranks' speeds, and every exchange takes the lengths into account.

Sources: DeepSpeed-Ulysses (arXiv 2309.14509), Ring Attention (arXiv 2310.01889), both on a grid of ranks (USP, arXiv
2405.07719).

Letters in names: B batch, L tokens, H heads, D channels of a head, C = H x D.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from wanduet.distributed.mesh import Mesh
from wanduet.distributed.p2p.exchange import P2PExchange, p2p_exchange
from wanduet.distributed.sequence.ring import RingAttention
from wanduet.distributed.sequence.ulysses import UlyssesAttention
from wanduet.distributed.split import rank_slice, split_lengths
from wanduet.errors import ConfigError
from wanduet.kernels.attention.backends import AttentionFn, AttentionLseFn, plain_with_lse
from wanduet.kernels.attention.call import AttentionCall

# Heads are exchanged in this many groups: while one group is attended to, the next is being exchanged.
HEAD_GROUPS = 2


class SequenceSharding:
    """A `Sharding` over `mesh.sequence`, for inference only.

    It stores the lengths of the sequence that it sharded last; `attend` and `gather_sequence` refer to that sequence.
    All ranks of the group must make the same calls in the same order.

    `block`: parts end at multiples of so many tokens, and at the end of the sequence; 1 by default. With that of a sparse
    attention, it chooses the same keys on any number of ranks. `by_collectives`: exchange all tokens' heads at once, by
    collectives; each call of the attention then gets all queries. False by default.
    """

    block = 1
    by_collectives = False

    def __init__(
        self,
        mesh: Mesh,
        attention_lse: AttentionLseFn | None = plain_with_lse,
        shares: Sequence[float] | None = None,
        head_groups: int = HEAD_GROUPS,
        always_ulysses: bool = False,
    ) -> None:
        """Create the sharding.

        `attention_lse` computes attention to a part of the keys; only the ring uses it. Pass that of the attention back
        end in use, or None if it has none. `shares` are the ranks' relative speeds, equal by default. `head_groups` is
        the number of groups in which Ulysses exchanges heads by collectives, so that exchanges overlap with attention;
        1 exchanges all heads at once. It has no effect where the mesh has `peer_memory`: there ranks exchange whatever
        is fastest, or always heads with `always_ulysses`.

        Raises ConfigError if the mesh has a ring and `attention_lse` is None, or if `shares` do not fit the mesh.
        """
        degree = mesh.layout.sequence
        self.shares = tuple(shares) if shares is not None else (1.0,) * degree
        if len(self.shares) != degree or min(self.shares) <= 0:
            raise ConfigError(f"shares={self.shares} must be {degree} positive numbers.")
        if mesh.layout.ring > 1 and attention_lse is None:
            raise ConfigError(
                "This attention back end cannot be used in a ring: it gives no log-sum-exp.",
                hint="Choose another with --attention, or a number of devices that divides the heads.",
            )
        self.mesh = mesh
        self._attention_lse = attention_lse
        # With a ring, keys and values already travel during the attention; a second communicator would compete with it.
        self._head_groups = head_groups if mesh.layout.ring == 1 else 1
        self._always_ulysses = always_ulysses
        self._rank = mesh.sequence_rank
        self._lengths: tuple[int, ...] = ()
        self._sent: set[int] = set()  # which of q (0), k (1) and v (2) of the next attention have been sent

    def shard_sequence(self, x: Tensor, dim: int) -> Tensor:
        """Return this rank's part of `x` along `dim`, a view; `x` must be the same on all ranks."""
        self._lengths = split_lengths(x.shape[dim], self.shares, self.block)
        rows = rank_slice(self._lengths, self._rank)
        return x.narrow(dim, rows.start, rows.stop - rows.start)

    def gather_sequence(self, x: Tensor, dim: int) -> Tensor:
        """Return the whole sequence along `dim`, on every rank, of which `x` is this rank's part.

        Raises ValueError if `x` has another length than this rank's part of the sequence sharded last.
        """
        self._check_part(x, dim)
        x = x.movedim(dim, 0)
        # Not every back end gathers unequal parts: the shorter ones are padded, and the padding is dropped.
        own = x.new_zeros((max(self._lengths), *x.shape[1:]))
        own[: x.shape[0]] = x
        parts = [torch.empty_like(own) for _ in self._lengths]
        dist.all_gather(parts, own, group=self.mesh.sequence)
        whole = torch.cat([part[:length] for part, length in zip(parts, self._lengths, strict=True)])
        return whole.movedim(0, dim)

    def gather_heads(self, x: Tensor, dim: int) -> Tensor:
        """Return a tensor for all heads; `x` is this rank's. See Sharding."""
        if self.mesh.layout.ulysses == 1:
            return x
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.mesh.layout.ulysses)]
        dist.all_gather(parts, x, group=self.mesh.ulysses)
        return torch.cat(parts, dim)

    @property
    def overlaps_projections(self) -> bool:
        """True between GPUs that write to each other's memory."""
        return self.mesh.peer_memory is not None and self.mesh.layout.ulysses > 1 and not self.by_collectives

    def qkv_buffer(self, index: int, like: Tensor) -> Tensor | None:
        """See Sharding. Raises what `attend` raises."""
        self._check_part(like, 1)
        exchange = self._p2p_exchange(like)
        return exchange.qkv_buffer(index, like) if exchange else None

    def send_qkv(self, index: int, x: Tensor) -> None:
        """See Sharding. Raises what `attend` raises."""
        self._check_part(x, 1)
        if exchange := self._p2p_exchange(x):
            exchange.send_qkv(index, x)
            self._sent.add(index)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFn, call: AttentionCall) -> Tensor:
        """Return attention of this rank's queries to the whole sequence, which `call` describes; all `[B, L, H, D]`, any
        dtype.

        Raises ValueError if the queries have another length than this rank's part of the sequence sharded last,
        ConfigError if the mesh's Ulysses degree does not divide the heads, RuntimeError if gradients are required.
        """
        self._check_part(q, 1)
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise RuntimeError("A sharded sequence is for inference: gradients do not pass through its exchanges.")
        layout = self.mesh.layout
        ring_lengths = [sum(self._lengths[r * layout.ulysses : (r + 1) * layout.ulysses]) for r in range(layout.ring)]
        # The queries of the ranks of this rank's Ulysses group.
        call = call.part(query=sum(self._lengths[: self._rank - self._ulysses_rank]))

        def local_attention(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
            if layout.ring == 1:
                return attention(q, k, v, call)
            assert self._attention_lse is not None
            ring = RingAttention.from_group(self.mesh.ring, ring_lengths)
            return ring.attend(q, k, v, self._attention_lse, call)

        if layout.ulysses == 1:
            return local_attention(q, k, v, call)
        exchange = self._p2p_exchange(q)
        if exchange is None:
            ulysses = UlyssesAttention(self.mesh.ulysses, self._ulysses_lengths, self._ulysses_rank)
            return ulysses.attend(q, k, v, local_attention, call, self._head_groups)
        for index, x in ((2, v), (1, k), (0, q)):
            if index not in self._sent:
                self.send_qkv(index, x)
        self._sent.clear()
        return exchange.attend(q, k, v, local_attention, call)

    def attend_first_block(
        self, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFn, call: AttentionCall
    ) -> Tensor:
        """Return `attend(q, k, v, attention, call)`."""
        return self.attend(q, k, v, attention, call)

    def _p2p_exchange(self, x: Tensor) -> P2PExchange | None:
        """Return the exchange by peer memory; None if the mesh has none, or for a batch larger than one."""
        memory = self.mesh.peer_memory if self.overlaps_projections else None
        if memory is None or x.shape[0] > 1:
            return None
        return p2p_exchange(self.mesh.layout, memory, self._ulysses_lengths, self._ulysses_rank, self._always_ulysses)

    @property
    def _ulysses_rank(self) -> int:
        return self._rank % self.mesh.layout.ulysses

    @property
    def _ulysses_lengths(self) -> tuple[int, ...]:
        """The numbers of tokens of the ranks of this rank's Ulysses group."""
        start = self._rank - self._ulysses_rank
        return self._lengths[start : start + self.mesh.layout.ulysses]

    def _check_part(self, x: Tensor, dim: int) -> None:
        expected = self._lengths[self._rank] if self._lengths else None
        if x.shape[dim] != expected:
            raise ValueError(f"A part of {x.shape[dim]} tokens, where shard_sequence last gave {expected}.")
