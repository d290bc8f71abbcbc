"""One sequence of tokens over several ranks: Ulysses, ring attention, or both. Exact, for any length.

Where ranks write to each other's memory, what they exchange is in p2p/exchange.py; else collectives swap heads.

Every rank holds a run of neighbouring tokens. Nothing is padded: parts differ by a token where the length
does not divide, or are cut in proportion to the ranks' speeds, and each exchange says how much it sends.

Sources: DeepSpeed-Ulysses (arXiv 2309.14509), Ring Attention (arXiv 2310.01889), their union on a grid of
ranks (USP, arXiv 2405.07719).

Letters in names: B batch, L tokens, H heads, D channels a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from wanduet.distributed.mesh import Mesh
from wanduet.distributed.p2p.exchange import DirectExchange, direct_exchange
from wanduet.distributed.sequence.ring import ring_attention
from wanduet.distributed.sequence.ulysses import HeadExchange
from wanduet.distributed.split import part_of, split_lengths
from wanduet.errors import ConfigError
from wanduet.kernels.attention.backends import AttentionFn, AttentionLseFn, plain_with_lse

# Heads are exchanged in this many groups: while one is attended to, the next one is under way.
HEAD_GROUPS = 2


class SequenceSharding:
    """A `Sharding` over `mesh.sequence`, for inference.

    It remembers the length of the sequence it sharded last; `attend` and `gather_sequence` are about that
    one. All ranks of the group must make the same calls in the same order.

    `attention_lse` computes attention to a part of the keys; only the ring uses it, and it should be the
    chosen back end's. `shares` are the ranks' relative speeds, equal if left out. `head_groups` is how far
    Ulysses cuts its heads so that collectives and attention overlap; 1 exchanges all at once. Without a use where
    the mesh has `peers`, who swap heads with `direct_heads` and else exchange what is best.
    """

    def __init__(
        self,
        mesh: Mesh,
        attention_lse: AttentionLseFn | None = plain_with_lse,
        shares: Sequence[float] | None = None,
        head_groups: int = HEAD_GROUPS,
        direct_heads: bool = False,
    ) -> None:
        """Raises ConfigError for a back end that a ring cannot use, or shares that do not fit the mesh."""
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
        # With a ring, keys and values already travel during the attention; one more communicator at the
        # same time would compete with it.
        self._head_groups = head_groups if mesh.layout.ring == 1 else 1
        self._direct_heads = direct_heads
        self._rank = mesh.sequence_rank
        self._lengths: tuple[int, ...] = ()
        self._sent: set[int] = set()  # of the next attention's q, k, v

    def shard_sequence(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of a whole sequence along `dim`, a view; all ranks must hold the same `x`."""
        self._lengths = split_lengths(x.shape[dim], self.shares)
        rows = part_of(self._lengths, self._rank)
        return x.narrow(dim, rows.start, rows.stop - rows.start)

    def gather_sequence(self, x: Tensor, dim: int) -> Tensor:
        """The whole sequence along `dim`, on every rank, from every rank's part. Raises ValueError for a part
        that is not of the sequence sharded last."""
        self._check_part(x, dim)
        x = x.movedim(dim, 0)
        # Every back end gathers equal parts; the shorter ones go with rows that are dropped.
        own = x.new_zeros((max(self._lengths), *x.shape[1:]))
        own[: x.shape[0]] = x
        parts = [torch.empty_like(own) for _ in self._lengths]
        dist.all_gather(parts, own, group=self.mesh.sequence)
        whole = torch.cat([part[:length] for part, length in zip(parts, self._lengths, strict=True)])
        return whole.movedim(0, dim)

    @property
    def sends_ahead(self) -> bool:
        """Between GPUs that write to each other's memory."""
        return self.mesh.peers is not None and self.mesh.layout.ulysses > 1

    def room(self, index: int, like: Tensor) -> Tensor | None:
        """See Sharding. Raises what `attend` raises."""
        self._check_part(like, 1)
        direct = self._direct(like)
        return direct.room(index, like) if direct else None

    def send(self, index: int, x: Tensor) -> None:
        """See Sharding. Raises what `attend` raises."""
        self._check_part(x, 1)
        if direct := self._direct(x):
            direct.send(index, x)
            self._sent.add(index)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFn) -> Tensor:
        """Attention of this rank's queries to the whole sequence's keys; all `[B, L, H, D]`, any dtype.

        Raises ValueError for queries that are not of the sequence sharded last, ConfigError for heads that
        the mesh's Ulysses degree does not divide, RuntimeError if gradients are asked for.
        """
        self._check_part(q, 1)
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise RuntimeError("A sharded sequence is for inference: gradients do not pass through its exchanges.")
        layout = self.mesh.layout
        rows = [self._lengths[r * layout.ulysses : (r + 1) * layout.ulysses] for r in range(layout.ring)]

        def attend_whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if layout.ring == 1:
                return attention(q, k, v)
            assert self._attention_lse is not None
            return ring_attention(q, k, v, [sum(row) for row in rows], self._attention_lse, self.mesh.ring)

        if layout.ulysses == 1:
            return attend_whole(q, k, v)
        direct = self._direct(q)
        if direct is None:
            collective = HeadExchange(self.mesh.ulysses, self._row_lengths, self._ulysses_rank)
            return collective.attend(q, k, v, attend_whole, self._head_groups)
        for index, x in ((2, v), (1, k), (0, q)):
            if index not in self._sent:
                self.send(index, x)
        self._sent.clear()
        return direct.attend(q, k, v, attend_whole)

    def attend_first(self, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFn) -> Tensor:
        """As in every block."""
        return self.attend(q, k, v, attention)

    def _direct(self, x: Tensor) -> DirectExchange | None:
        """For a batch of one, between GPUs that write to each other's memory."""
        peers = self.mesh.peers if self.sends_ahead else None
        if peers is None or x.shape[0] > 1:
            return None
        return direct_exchange(self.mesh.layout, peers, self._row_lengths, self._ulysses_rank, self._direct_heads)

    @property
    def _ulysses_rank(self) -> int:
        return self._rank % self.mesh.layout.ulysses

    @property
    def _row_lengths(self) -> tuple[int, ...]:
        """The tokens of the ranks that exchange heads with this one."""
        start = self._rank - self._ulysses_rank
        return self._lengths[start : start + self.mesh.layout.ulysses]

    def _check_part(self, x: Tensor, dim: int) -> None:
        expected = self._lengths[self._rank] if self._lengths else None
        if x.shape[dim] != expected:
            raise ValueError(f"A part of {x.shape[dim]} tokens, where shard_sequence last gave {expected}.")
