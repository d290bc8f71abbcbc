"""Keys and values of the whole sequence on every rank, between GPUs that can write to each other's memory.

Queries stay where they are, with all their heads: each rank attends with its own to all keys, in one launch, and
nothing has to come back. A rank's work is in proportion to its tokens, attention included, so that a faster one can
be given more of them.

Keys and values are computed where they are needed, in this rank's rows of its buffer, and copied from there into the
others' by a GPU's copy engines. Values travel while keys are projected, and those while queries are.

Source: context parallelism of Llama 3 (arXiv 2407.21783, 3.3.2), which gathers them by collectives. Each rank
receives `2 (P - 1) / P` sequences of hidden states a block; swapping heads (heads.py), `4 (P - 1) / P^2`. So
two ranks receive as much either way, more ranks less with heads.

Letters in names: B batch (of one), L tokens, H heads, D channels a head, C = H x D, P ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from torch import Size, Tensor

from wanduet.distributed.p2p.memory import PeerMemory, tell_all
from wanduet.distributed.split import others, part_of
from wanduet.kernels.attention.backends import AttentionFn
from wanduet.kernels.views import copy_rows

KEYS, VALUES = 1, 2
# Channels: keys or values have come (1, 2); they have been read.
READ = {KEYS: 3, VALUES: 4}


@dataclass(frozen=True, slots=True)
class DirectKeys:
    """A `DirectExchange` that gathers keys and values among the ranks of `memory`, which hold `lengths` tokens; this
    is rank `rank`."""

    memory: PeerMemory
    lengths: Sequence[int]
    rank: int

    def room(self, index: int, like_BLC: Tensor) -> Tensor | None:
        """See DirectExchange: for keys and values this rank's rows in its buffer, from where they are sent."""
        if index not in READ:
            return None
        self._reserve(like_BLC)
        return self._rows(self.rank, index, like_BLC)

    def send(self, index: int, x_BLHD: Tensor) -> None:
        """See DirectExchange."""
        if index not in READ:
            return
        self._reserve(x_BLHD)
        self.memory.follow()
        for rank in others(len(self.lengths), self.rank):
            self.memory.heed(rank, READ[index])
            self.memory.copy(x_BLHD, self._rows(rank, index, x_BLHD))
            self.memory.tell(rank, index)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attend_whole: AttentionFn) -> Tensor:
        """See DirectExchange."""
        for index, x_BLHD in ((KEYS, k), (VALUES, v)):
            own_BLHD = self._rows(self.rank, index, x_BLHD)
            if own_BLHD.data_ptr() != x_BLHD.data_ptr():  # it was not computed there
                copy_rows(own_BLHD, x_BLHD)
        for rank, index in product(others(len(self.lengths), self.rank), READ):
            self.memory.hear(rank, index)
        whole_k, whole_v = (self._whole(self.rank, index, q) for index in (KEYS, VALUES))
        out_BLHD = attend_whole(q, whole_k, whole_v) if q.numel() else q
        self.memory.join()  # what was sent may be overwritten from here on
        self._tell_read()
        return out_BLHD

    def _reserve(self, like: Tensor) -> None:
        if self.memory.reserve(keys_bytes(self.lengths, like.shape[2:].numel(), like.itemsize)):
            self._tell_read()

    def _tell_read(self) -> None:
        """Others may send their next keys and values."""
        tell_all(self.memory, others(len(self.lengths), self.rank), READ.values())

    def _whole(self, rank: int, index: int, like: Tensor) -> Tensor:
        """Keys or values of all tokens `[1, all ranks' L, ...]` in a rank's buffer."""
        shape = (1, sum(self.lengths), *like.shape[2:])
        return self.memory.on(rank, (index - KEYS) * Size(shape).numel(), shape, like.dtype)

    def _rows(self, rank: int, index: int, like: Tensor) -> Tensor:
        """This rank's among them `[1, this rank's L, ...]`."""
        return self._whole(rank, index, like)[:, part_of(self.lengths, self.rank)]


def keys_bytes(lengths: Sequence[int], width: int, itemsize: int) -> int:
    """The buffer's size for ranks that hold so many tokens of `width` channels: keys and values of all of them."""
    return 2 * sum(lengths) * width * itemsize
