"""Ulysses between GPUs that can write to each other's memory: every row goes straight to where it is needed.

What sequence/ulysses.py does with collectives, which are kernels: they take multiprocessors from the attention that they run
beside, and want what they send and receive in one piece, packed and unpacked by more kernels. Here a GPU's copy
engines take each head from where the projection left it to its place in the other GPU's queries, keys or values, and
each result to its place between the other heads'. Nothing runs on the multiprocessors for it but the copies of keys
and values that stay on this rank. Values travel while keys are projected, and those while queries are.

A rank attends to its own queries first, for which it waits for nobody's; then to each other rank's, whose results
leave at once; then to the rest of its own, while results travel.

No barrier is needed between blocks. Keys and values may come again as soon as their receiver says that it has read
those of the block before. Queries need no such word: their sender sends the next ones after it has had the results of
these; nor do results: they are of queries that their receiver has sent after it had read the results before.

Letters in names: B batch (of one), L tokens, H heads, D channels a head, P ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from wanduet.distributed.p2p.memory import PeerMemory, tell_all
from wanduet.distributed.sequence.ulysses import heads_of_rank
from wanduet.distributed.split import others, part_of
from wanduet.kernels.attention.backends import AttentionFn
from wanduet.kernels.views import copy_rows

# Channels: q, k and v have come (0, 1, 2); so have results; keys and values have been read.
RESULT = 3
READ = {1: 4, 2: 5}
# A rank keeps so many of its own queries for last, a quarter at most. With six heads this is one round of a Hopper's
# 132 multiprocessors, at 192 queries each: at 480p it takes 0.6 ms, and the results of others 0.1 ms to arrive.
LAST_QUERIES = 4224


@dataclass(frozen=True, slots=True)
class DirectHeads:
    """A `DirectExchange` that swaps tokens for heads among the ranks of `memory`, which hold `lengths` tokens; this is
    rank `rank`.

    With `at_once`, attention is given all queries together, else some at a time.
    """

    memory: PeerMemory
    lengths: Sequence[int]
    rank: int
    at_once: bool = False

    def room(self, index: int, like_BLC: Tensor) -> None:
        """Other heads than this rank's have no place in its buffer."""

    def send(self, index: int, x_BLHD: Tensor) -> None:
        """See DirectExchange. Raises ConfigError if the ranks do not divide the heads."""
        heads = heads_of_rank(x_BLHD, len(self.lengths))
        if self.memory.reserve(heads_bytes(self.lengths, x_BLHD.shape[2] * x_BLHD.shape[3], x_BLHD.itemsize)):
            self._tell_read()
        self.memory.follow()
        for rank in others(len(self.lengths), self.rank):
            if index in READ:
                self.memory.heed(rank, READ[index])
            theirs = x_BLHD[:, :, rank * heads : (rank + 1) * heads]
            self.memory.copy(theirs, self._whole(rank, index, x_BLHD)[:, part_of(self.lengths, self.rank)])
            self.memory.tell(rank, index)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attend_whole: AttentionFn) -> Tensor:
        """See DirectExchange. The result is in the buffer until the next call."""
        heads = heads_of_rank(q, len(self.lengths))
        mine = slice(self.rank * heads, (self.rank + 1) * heads)
        whole_q, whole_k, whole_v = (self._whole(self.rank, index, q) for index in range(3))
        stays = [(whole_k, k), (whole_v, v), *([(whole_q, q)] if self.at_once else [])]
        for whole_BLHD, x_BLHD in stays:
            copy_rows(whole_BLHD[:, part_of(self.lengths, self.rank)], x_BLHD[:, :, mine])
        for rank, index in product(others(len(self.lengths), self.rank), READ):
            self.memory.hear(rank, index)
        if self.at_once:
            attended = self._at_once(whole_q, whole_k, whole_v, attend_whole)
        else:
            attended = self._in_turns(q[:, :, mine], whole_q, whole_k, whole_v, attend_whole)
        leaving: list[Tensor] = []  # nobody else's memory until it has left
        for rank, rows, part_BLHD in attended:
            leaving.append(part_BLHD.contiguous())
            self.memory.follow()
            self.memory.copy(leaving[-1], self._out(rank, q)[:, rows, mine])
            if rank != self.rank:
                self.memory.tell(rank, RESULT)
        for rank in others(len(self.lengths), self.rank):
            self.memory.hear(rank, RESULT)
        self.memory.join()  # what was sent may be overwritten from here on
        self._tell_read()
        return self._out(self.rank, q)

    def _in_turns(
        self, own_BLHD: Tensor, q: Tensor, k: Tensor, v: Tensor, attend: AttentionFn
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """Whose queries were attended to, which of its rows, and the result; from this rank's queries for its own
        heads, and from q, k and v as they have come."""
        length = own_BLHD.shape[1]
        last = length - min(LAST_QUERIES, length // 4)

        def some(q_BLHD: Tensor) -> Tensor:
            return attend(q_BLHD, k, v) if q_BLHD.numel() else q_BLHD

        yield self.rank, slice(0, last), some(own_BLHD[:, :last])
        for rank in others(len(self.lengths), self.rank):
            self.memory.hear(rank, 0)
            yield rank, slice(None), some(q[:, part_of(self.lengths, rank)])
        yield self.rank, slice(last, length), some(own_BLHD[:, last:])

    def _at_once(self, q: Tensor, k: Tensor, v: Tensor, attend: AttentionFn) -> Iterator[tuple[int, slice, Tensor]]:
        """The same of all queries together."""
        for rank in others(len(self.lengths), self.rank):
            self.memory.hear(rank, 0)
        attended_BLHD = attend(q, k, v)
        for rank in (*others(len(self.lengths), self.rank), self.rank):
            yield rank, slice(None), attended_BLHD[:, part_of(self.lengths, rank)]

    def _tell_read(self) -> None:
        """Others may send their next keys and values."""
        tell_all(self.memory, others(len(self.lengths), self.rank), READ.values())

    def _whole(self, rank: int, index: int, like: Tensor) -> Tensor:
        """q, k or v `[1, all ranks' L, a rank's heads, D]` in a rank's buffer."""
        _, _, heads, channels = like.shape
        shape = (1, sum(self.lengths), heads // len(self.lengths), channels)
        return self.memory.on(rank, index * torch.Size(shape).numel(), shape, like.dtype)

    def _out(self, rank: int, like: Tensor) -> Tensor:
        """The result `[1, a rank's L, H, D]` in its buffer, behind q, k and v."""
        _, _, heads, channels = like.shape
        start = 3 * sum(self.lengths) * (heads // len(self.lengths)) * channels
        return self.memory.on(rank, start, (1, self.lengths[rank], heads, channels), like.dtype)


def heads_bytes(lengths: Sequence[int], width: int, itemsize: int) -> int:
    """The buffer's size for ranks that hold so many tokens of `width` channels: q, k, v of all for a rank's heads, and
    one rank's result."""
    return (3 * sum(lengths) * (width // len(lengths)) + max(lengths) * width) * itemsize
