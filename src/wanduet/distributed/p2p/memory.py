"""The interface to memory that the ranks of a group share, and to the copies and signals between them.

Letters in names: B batch (always 1), L tokens, H heads, D channels of a head.
"""

from collections.abc import Iterable
from itertools import product
from typing import Protocol

import torch
from torch import Tensor


class PeerMemory(Protocol):
    """A buffer on every rank of a group, to which all ranks of the group copy.

    Copies run on a stream of their own, beside the current stream, which computes. Ranks synchronise by signals, on 16
    channels for each ordered pair of ranks.
    """

    def reserve(self, size: int) -> bool:
        """Provide a buffer of at least `size` bytes on every rank, and return whether it is new.

        All ranks must call this together, with the same size. A larger buffer replaces the previous one; for a new
        buffer all counts of signals start at zero.
        """

    def buffer(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a view of `rank`'s buffer, starting at element (of `dtype`) `offset`."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Start to copy `source` `[1, L, H, D]` into `target`, a view of a rank's buffer.

        The heads of one token must be contiguous in both.
        """

    def signal(self, rank: int, channel: int) -> None:
        """Signal `rank` once the copies queued so far are done. Each signal satisfies exactly one wait."""

    def wait(self, rank: int, channel: int) -> None:
        """Make the current stream wait for a signal of `rank`."""

    def copy_wait(self, rank: int, channel: int) -> None:
        """Make further copies wait for a signal of `rank`."""

    def copy_wait_compute(self) -> None:
        """Make further copies wait for the work queued on the current stream so far."""

    def wait_copies(self) -> None:
        """Make the current stream wait for this rank's copies."""


def signal_all(memory: PeerMemory, ranks: Iterable[int], channels: Iterable[int]) -> None:
    """Signal `ranks` on `channels`, once the work queued on the current stream so far is done."""
    memory.copy_wait_compute()
    for rank, channel in product(ranks, channels):
        memory.signal(rank, channel)
