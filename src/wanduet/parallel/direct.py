"""Ulysses between GPUs that can write to each other's memory: every row goes straight to where it is needed.

What heads.py does with collectives, which are kernels: they take multiprocessors from the attention that they run
beside, and want what they send and receive in one piece, packed and unpacked by more kernels. Here a GPU's copy
engines take each head from where the projection left it to its place in the other GPU's queries, keys or values, and
each result to its place between the other heads'. Nothing runs on the multiprocessors for it but the copies of what
stays on this rank. Values travel while keys are projected, and those while queries are.

No barrier is needed between blocks. A rank sends the next block's heads only after it has had every result of this
block, for which their receiver has read all that the rank had sent it; and sends results only for heads that it was
sent after their receiver had read the results of the block before.

Letters in names: B batch (of one), L tokens, H heads, D channels a head, P ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

from wanduet.parallel.heads import heads_of_rank


class PeerMemory(Protocol):
    """A buffer on every rank of a group, to which all of them copy, beside what they compute."""

    def reserve(self, size: int) -> None:
        """So many bytes on every rank. All must ask for the same, together; a larger buffer replaces the one before."""

    def on(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A rank's buffer from element `offset` on."""

    def follow(self) -> None:
        """Copies from here on wait for what has been computed so far."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Begin to copy `[B=1, L, H, D]`, of which the heads of a token lie side by side, into a rank's buffer."""

    def tell(self, rank: int, channel: int) -> None:
        """Tell a rank that what was copied to it so far is there. Waits until it has heard the last word on this
        channel."""

    def hear(self, rank: int, channel: int) -> None:
        """What is computed from here on waits for a rank's word."""

    def join(self) -> None:
        """What is computed from here on waits for this rank's copies."""


RESULT = 3  # the channel of results; those of q, k and v are 0, 1 and 2


@dataclass(frozen=True, slots=True)
class DirectExchange:
    """Swaps tokens for heads among the ranks of `memory`, which hold `lengths` tokens; this is rank `rank`.

    For a batch of one.
    """

    memory: PeerMemory
    lengths: Sequence[int]
    rank: int

    def send(self, index: int, x_BLHD: Tensor) -> None:
        """Begin to send this rank's q (index 0), k (1) or v (2) `[1, this rank's L, H, D]`; each once before `attend`.

        Raises ConfigError if the ranks do not divide the heads.
        """
        heads = heads_of_rank(x_BLHD, len(self.lengths))
        self.memory.reserve(direct_bytes(self.lengths, x_BLHD.shape[2] * x_BLHD.shape[3], x_BLHD.itemsize))
        self.memory.follow()
        for rank in self._others():
            theirs = x_BLHD[:, :, rank * heads : (rank + 1) * heads]
            self.memory.copy(theirs, self._whole(rank, index, x_BLHD)[:, self._rows(self.rank)])
            self.memory.tell(rank, index)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, attend_whole: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Attention of this rank's queries, all heads, after all three have been sent; `[1, this rank's L, H, D]`, in
        the buffer until the next call.

        `attend_whole` is given all ranks' tokens and this rank's heads.
        """
        heads = heads_of_rank(q, len(self.lengths))
        mine, own_rows = slice(self.rank * heads, (self.rank + 1) * heads), self._rows(self.rank)
        whole = [self._whole(self.rank, index, x_BLHD) for index, x_BLHD in enumerate((q, k, v))]
        for x_BLHD, whole_BLHD in zip((q, k, v), whole, strict=True):
            whole_BLHD[:, own_rows] = x_BLHD[:, :, mine]  # while others are on their way
        for rank, index in product(self._others(), range(len(whole))):
            self.memory.hear(rank, index)
        attended_BLHD = attend_whole(*whole).contiguous()
        self.memory.follow()
        for rank in self._others():
            self.memory.copy(attended_BLHD[:, self._rows(rank)], self._out(rank, q)[:, :, mine])
            self.memory.tell(rank, RESULT)
        out_BLHD = self._out(self.rank, q)
        out_BLHD[:, :, mine] = attended_BLHD[:, own_rows]
        for rank in self._others():
            self.memory.hear(rank, RESULT)
        self.memory.join()  # what was attended to may be overwritten from here on
        return out_BLHD

    def _others(self) -> list[int]:
        """The other ranks, from the next one on: not all write to the same one at a time."""
        count = len(self.lengths)
        return [(self.rank + step) % count for step in range(1, count)]

    def _rows(self, rank: int) -> slice:
        """A rank's tokens in the whole sequence."""
        start = sum(self.lengths[:rank])
        return slice(start, start + self.lengths[rank])

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


def direct_bytes(lengths: Sequence[int], width: int, itemsize: int) -> int:
    """The buffer's size for ranks that hold so many tokens of `width` channels: q, k, v of all for a rank's heads, and
    one rank's result."""
    return (3 * sum(lengths) * (width // len(lengths)) + max(lengths) * width) * itemsize
