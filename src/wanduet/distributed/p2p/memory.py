"""Memory of several ranks, to which all of them write: what an exchange by copies asks of it.

Letters in names: B batch (of one), L tokens, H heads, D channels a head.
"""

from collections.abc import Iterable
from itertools import product
from typing import Protocol

import torch
from torch import Tensor


class PeerMemory(Protocol):
    """A buffer on every rank of a group, to which all of them copy, beside what they compute."""

    def reserve(self, size: int) -> bool:
        """So many bytes on every rank. All must ask for the same, together; a larger buffer replaces the one before.
        Whether this is a new one, about which nothing has been said yet."""

    def on(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A rank's buffer from element `offset` on."""

    def follow(self) -> None:
        """Copies from here on wait for what has been computed so far."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Begin to copy `[B=1, L, H, D]`, of which the heads of a token lie side by side, into a rank's buffer."""

    def tell(self, rank: int, channel: int) -> None:
        """Tell a rank, after the copies so far, on one of 16 channels. It hears as many words as it was told."""

    def hear(self, rank: int, channel: int) -> None:
        """What is computed from here on waits for a rank's word."""

    def heed(self, rank: int, channel: int) -> None:
        """Copies from here on wait for a rank's word."""

    def join(self) -> None:
        """What is computed from here on waits for this rank's copies."""


def tell_all(memory: PeerMemory, ranks: Iterable[int], channels: Iterable[int]) -> None:
    """Tell ranks, after what has been computed so far."""
    memory.follow()
    for rank, channel in product(ranks, channels):
        memory.tell(rank, channel)
