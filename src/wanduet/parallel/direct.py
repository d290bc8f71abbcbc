"""Ulysses between GPUs that can write to each other's memory: every row goes straight to where it is needed.

What heads.py does with collectives, which are kernels: they take multiprocessors from the attention that they run
beside, and want what they send and receive in one piece, packed and unpacked by more kernels. Here a GPU's copy
engines take each head from where the projection left it to its place in the other GPU's queries, keys or values, and
each result to its place between the other heads'. Nothing else runs on the multiprocessors for it but the copies of
what stays on this rank.

No barrier is needed between blocks. A rank sends the next block's heads only after it has had every result of this
block, for which their receiver has read all that the rank had sent it; and sends results only for heads that it was
sent after their receiver had read the results of the block before.

Letters in names: B batch (of one), L tokens, H heads, D channels a head, P ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from typing import Protocol

import torch
from torch import Tensor

from wanduet.parallel.heads import heads_of_rank, slices


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


@dataclass(frozen=True, slots=True)
class DirectExchange:
    """Swaps tokens for heads among the ranks of `memory`, which hold `lengths` tokens; this is rank `rank`.

    The result is in the buffer, and there until the next call. For a batch of one.
    """

    memory: PeerMemory
    lengths: Sequence[int]
    rank: int

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, attend_whole: Callable[[Tensor, Tensor, Tensor], Tensor], groups: int
    ) -> Tensor:
        """As HeadExchange.attend, for `[1, this rank's L, H, D]`."""
        ranks = len(self.lengths)
        heads = heads_of_rank(q, ranks)
        self.memory.reserve(direct_bytes(self.lengths, q.shape[2] * q.shape[3], q.itemsize))
        wholes, outs = [self._whole(r, q) for r in range(ranks)], [self._out(r, q) for r in range(ranks)]
        others = [(self.rank + step) % ranks for step in range(1, ranks)]  # not all write to the same one at a time
        rows = [slice(stop - length, stop) for stop, length in zip(accumulate(self.lengths), self.lengths, strict=True)]
        own_rows, own_heads = rows[self.rank], slice(self.rank * heads, (self.rank + 1) * heads)
        parts = slices(heads, groups)

        self.memory.follow()
        for group, part in enumerate(parts):
            for rank in others:
                theirs = slice(rank * heads + part.start, rank * heads + part.stop)
                for x_BLHD, whole_BLHD in zip((q, k, v), wholes[rank], strict=True):
                    self.memory.copy(x_BLHD[:, :, theirs], whole_BLHD[:, own_rows, part])
                self.memory.tell(rank, group)
        for x_BLHD, whole_BLHD in zip((q, k, v), wholes[self.rank], strict=True):
            whole_BLHD[:, own_rows] = x_BLHD[:, :, own_heads]  # while the first group is on its way

        results: list[Tensor] = []  # kept until they are copied
        for group, part in enumerate(parts):
            for rank in others:
                self.memory.hear(rank, group)
            attended_BLHD = attend_whole(*(whole_BLHD[:, :, part] for whole_BLHD in wholes[self.rank])).contiguous()
            results.append(attended_BLHD)
            place = slice(own_heads.start + part.start, own_heads.start + part.stop)
            self.memory.follow()
            for rank in others:
                self.memory.copy(attended_BLHD[:, rows[rank]], outs[rank][:, :, place])
                self.memory.tell(rank, len(parts) + group)
            outs[self.rank][:, :, place] = attended_BLHD[:, own_rows]
        for rank, group in product(others, range(len(parts))):
            self.memory.hear(rank, len(parts) + group)
        self.memory.join()
        return outs[self.rank]

    def _whole(self, rank: int, like: Tensor) -> list[Tensor]:
        """q, k, v `[1, all ranks' L, a rank's heads, D]` in a rank's buffer."""
        _, _, heads, channels = like.shape
        shape = (3, 1, sum(self.lengths), heads // len(self.lengths), channels)
        return list(self.memory.on(rank, 0, shape, like.dtype))

    def _out(self, rank: int, like: Tensor) -> Tensor:
        """The result `[1, a rank's L, H, D]` in its buffer, behind q, k and v."""
        _, _, heads, channels = like.shape
        start = 3 * sum(self.lengths) * (heads // len(self.lengths)) * channels
        return self.memory.on(rank, start, (1, self.lengths[rank], heads, channels), like.dtype)


def direct_bytes(lengths: Sequence[int], width: int, itemsize: int) -> int:
    """The buffer's size for ranks that hold so many tokens of `width` channels: q, k, v of all for a rank's heads, and
    one rank's result."""
    return (3 * sum(lengths) * (width // len(lengths)) + max(lengths) * width) * itemsize
