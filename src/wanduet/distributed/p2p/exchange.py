"""What GPUs exchange that can write to each other's memory: keys and values, or heads.

Letters in names: B batch (of one), L tokens, H heads, D channels a head, C = H x D.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from wanduet.distributed.mesh import Layout
from wanduet.distributed.p2p.heads import DirectHeads, heads_bytes
from wanduet.distributed.p2p.keys import DirectKeys, keys_bytes
from wanduet.distributed.p2p.memory import PeerMemory
from wanduet.kernels.attention.backends import AttentionFn


class DirectExchange(Protocol):
    """One attention of a sequence that several ranks hold."""

    def room(self, index: int, like_BLC: Tensor) -> Tensor | None:
        """Where this rank's q (index 0), k (1) or v (2) should be computed, `[1, this rank's L, C]` in one piece; None
        where it does not matter."""

    def send(self, index: int, x_BLHD: Tensor) -> None:
        """Begin to send this rank's q (index 0), k (1) or v (2) `[1, this rank's L, H, D]`; each once before `attend`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attend_whole: AttentionFn) -> Tensor:
        """Attention of this rank's queries, all heads, after all three have been sent; `[1, this rank's L, H, D]`.

        `attend_whole` is given queries, and all ranks' keys and values for the same heads; perhaps several times.
        """


def direct_exchange(
    layout: Layout, memory: PeerMemory, lengths: Sequence[int], rank: int, heads: bool = False
) -> DirectExchange:
    """For `rank` of the ranks along a layout's Ulysses axis, which hold `lengths` tokens and write to `memory`.

    Two ranks exchange as much either way, and have less to wait for with keys and values; more of them, and those
    whose keys also go around a ring, or who are told to (`heads`), swap heads.
    """
    if heads or not _sends_keys(layout):
        # Around a ring, keys and values would travel again for every part of the queries.
        return DirectHeads(memory, lengths, rank, at_once=layout.ring > 1)
    return DirectKeys(memory, lengths, rank)


def direct_bytes(layout: Layout, lengths: Sequence[int], width: int, itemsize: int) -> int:
    """The buffer's size for ranks that hold so many tokens of `width` channels."""
    return (keys_bytes if _sends_keys(layout) else heads_bytes)(lengths, width, itemsize)


def _sends_keys(layout: Layout) -> bool:
    return layout.ulysses == 2 and layout.ring == 1
