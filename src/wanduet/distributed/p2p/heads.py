"""Ulysses between GPUs that write to each other's memory: every row is copied straight to where it is used.

The collectives of sequence/ulysses.py are kernels: they take multiprocessors from the attention that runs beside them,
and need contiguous messages, which further kernels pack and unpack. Here a GPU's copy engines copy each head from the
projection's output to its place in the other GPU's queries, keys or values, and each result to its place between the
heads of the other ranks. The multiprocessors only copy the keys and values that stay on this rank. Values travel while
keys are projected, keys while queries are projected.

A rank attends with its own queries first, because they need no wait; then with each other rank's, and sends each result
at once; then with the rest of its own, while results travel.

Blocks need no barrier between them. Keys and values of the next block may be sent once their receiver signals that it
has read those of this block. Queries need no such signal: a rank sends the next queries only after it has received the
results of these. Results need none either: they belong to queries that their receiver sent after it had read the
results before.

Letters in names: B batch (always 1), L tokens, H heads, D channels of a head, P ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from wanduet.distributed.p2p.memory import PeerMemory, signal_all
from wanduet.distributed.sequence.ulysses import heads_per_rank
from wanduet.distributed.split import other_ranks, rank_slice
from wanduet.kernels.attention.backends import AttentionFn
from wanduet.kernels.attention.call import AttentionCall
from wanduet.kernels.views import copy_rows

# Channels 0, 1 and 2 signal that q, k and v have arrived, 3 that results have, 4 and 5 that k and v have been read.
RESULT_CHANNEL = 3
READ_CHANNELS = {1: 4, 2: 5}
# A rank defers at most this many of its own queries, and at most a quarter. With six heads this is one wave of a
# Hopper's 132 multiprocessors, at 192 queries each: at 480p it takes 0.6 ms, and the other rank's results take 0.1 ms
# to arrive.
MAX_DEFERRED_QUERIES = 4224
TILE = 128  # queries of the largest tile


@dataclass(frozen=True, slots=True)
class P2PUlysses:
    """A `P2PExchange` that exchanges tokens for heads. The ranks have `lengths` tokens; this is `rank`.

    With `single_call`, `local_attention` is called once with all queries, otherwise several times with some of them.
    """

    memory: PeerMemory
    lengths: Sequence[int]
    rank: int
    single_call: bool = False

    def qkv_buffer(self, index: int, like_BLC: Tensor) -> None:
        """Return None: the buffer has no place for the heads of other ranks."""

    def send_qkv(self, index: int, x_BLHD: Tensor) -> None:
        """See P2PExchange. Raises ConfigError if the number of ranks does not divide the heads."""
        heads = heads_per_rank(x_BLHD, len(self.lengths))
        if self.memory.reserve(ulysses_buffer_bytes(self.lengths, x_BLHD.shape[2] * x_BLHD.shape[3], x_BLHD.itemsize)):
            self._signal_read()
        self.memory.copy_wait_compute()
        for rank in other_ranks(len(self.lengths), self.rank):
            if index in READ_CHANNELS:
                self.memory.copy_wait(rank, READ_CHANNELS[index])
            theirs = x_BLHD[:, :, rank * heads : (rank + 1) * heads]
            self.memory.copy(theirs, self._whole(rank, index, x_BLHD)[:, rank_slice(self.lengths, self.rank)])
            self.memory.signal(rank, index)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, local_attention: AttentionFn, call: AttentionCall) -> Tensor:
        """See P2PExchange. The result is a view of the buffer, valid until the next call."""
        heads = heads_per_rank(q, len(self.lengths))
        mine, call = slice(self.rank * heads, (self.rank + 1) * heads), call.part(head=self.rank * heads)
        whole_q, whole_k, whole_v = (self._whole(self.rank, index, q) for index in range(3))
        stays = [(whole_k, k), (whole_v, v), *([(whole_q, q)] if self.single_call else [])]
        for whole_BLHD, x_BLHD in stays:
            copy_rows(whole_BLHD[:, rank_slice(self.lengths, self.rank)], x_BLHD[:, :, mine])
        for rank, index in product(other_ranks(len(self.lengths), self.rank), READ_CHANNELS):
            self.memory.wait(rank, index)
        if self.single_call:
            results = self._attend_all(whole_q, whole_k, whole_v, local_attention, call)
        else:
            results = self._attend_by_rank(q[:, :, mine], whole_q, whole_k, whole_v, local_attention, call)
        sent: list[Tensor] = []  # keeps the results' memory from being reused before the copies are done
        for rank, rows, result_BLHD in results:
            sent.append(result_BLHD.contiguous())
            self.memory.copy_wait_compute()
            self.memory.copy(sent[-1], self._out(rank, q)[:, rows, mine])
            if rank != self.rank:
                self.memory.signal(rank, RESULT_CHANNEL)
        for rank in other_ranks(len(self.lengths), self.rank):
            self.memory.wait(rank, RESULT_CHANNEL)
        self.memory.wait_copies()  # the caller may overwrite what was sent
        self._signal_read()
        return self._out(self.rank, q)

    def _attend_by_rank(
        self, own_BLHD: Tensor, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFn, call: AttentionCall
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield the rank whose queries were attended with, the slice of its tokens, and the result.

        `own_BLHD` are this rank's queries of its own heads; q, k and v are in the buffer.
        """
        length = own_BLHD.shape[1]
        # Both parts begin with a tile of an attention kernel: sparse attention chooses keys for each.
        deferred = (length - min(MAX_DEFERRED_QUERIES, length // 4)) // TILE * TILE

        first = rank_slice(self.lengths, self.rank).start

        def attend(q_BLHD: Tensor, first_query: int) -> Tensor:
            return attention(q_BLHD, k, v, call.part(query=first_query)) if q_BLHD.numel() else q_BLHD

        yield self.rank, slice(0, deferred), attend(own_BLHD[:, :deferred], first)
        for rank in other_ranks(len(self.lengths), self.rank):
            self.memory.wait(rank, 0)
            rows = rank_slice(self.lengths, rank)
            yield rank, slice(None), attend(q[:, rows], rows.start)
        yield self.rank, slice(deferred, length), attend(own_BLHD[:, deferred:], first + deferred)

    def _attend_all(
        self, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFn, call: AttentionCall
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield the same as `_attend_by_rank`, from one call with all queries."""
        for rank in other_ranks(len(self.lengths), self.rank):
            self.memory.wait(rank, 0)
        out_BLHD = attention(q, k, v, call)
        for rank in (*other_ranks(len(self.lengths), self.rank), self.rank):
            yield rank, slice(None), out_BLHD[:, rank_slice(self.lengths, rank)]

    def _signal_read(self) -> None:
        """Let the other ranks send their next keys and values."""
        signal_all(self.memory, other_ranks(len(self.lengths), self.rank), READ_CHANNELS.values())

    def _whole(self, rank: int, index: int, like: Tensor) -> Tensor:
        """Return q, k or v `[1, all ranks' L, heads of a rank, D]` in `rank`'s buffer."""
        _, _, heads, channels = like.shape
        shape = (1, sum(self.lengths), heads // len(self.lengths), channels)
        return self.memory.buffer(rank, index * torch.Size(shape).numel(), shape, like.dtype)

    def _out(self, rank: int, like: Tensor) -> Tensor:
        """Return the result `[1, L of rank, H, D]` in `rank`'s buffer, which lies behind q, k and v."""
        _, _, heads, channels = like.shape
        start = 3 * sum(self.lengths) * (heads // len(self.lengths)) * channels
        return self.memory.buffer(rank, start, (1, self.lengths[rank], heads, channels), like.dtype)


def ulysses_buffer_bytes(lengths: Sequence[int], width: int, itemsize: int) -> int:
    """Return the buffer size in bytes, for tokens of `width` channels.

    It contains q, k and v of all ranks' tokens for one rank's heads, and the longest rank's result for all heads.
    """
    return (3 * sum(lengths) * (width // len(lengths)) + max(lengths) * width) * itemsize
