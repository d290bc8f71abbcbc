"""All-gather of keys and values, between GPUs that write to each other's memory.

Queries stay on their rank, with all heads: each rank attends with its own queries to all keys in one kernel launch, and
no results travel. A rank's work, attention included, is proportional to its tokens, so that a faster rank can be given
more.

Each rank computes its keys and values in place, in its rows of its own buffer, and its copy engines copy them from
there into the other ranks' buffers. Values travel while keys are projected, keys while queries are projected.

Source: context parallelism of Llama 3 (arXiv 2407.21783, 3.3.2), which gathers by collectives. Each of P ranks receives
`2 (P - 1) / P` sequences of hidden states in a block; with exchange of heads (heads.py), `4 (P - 1) / P^2`. So two
ranks receive the same amount either way, and more ranks receive less with heads.

Letters in names: B batch (always 1), L tokens, H heads, D channels of a head, C = H x D, P ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from torch import Size, Tensor

from wanduet.distributed.p2p.memory import PeerMemory, signal_all
from wanduet.distributed.split import other_ranks, rank_slice
from wanduet.kernels.attention.backends import AttentionFn
from wanduet.kernels.attention.call import AttentionCall
from wanduet.kernels.views import copy_rows

KEYS, VALUES = 1, 2  # the indices of k and v, and the channels that signal their arrival
# The channels that signal that they have been read and may be overwritten.
READ_CHANNELS = {KEYS: 3, VALUES: 4}


@dataclass(frozen=True, slots=True)
class P2PAllGatherKV:
    """A `P2PExchange` that gathers keys and values. The ranks have `lengths` tokens; this is `rank`."""

    memory: PeerMemory
    lengths: Sequence[int]
    rank: int

    def qkv_buffer(self, index: int, like_BLC: Tensor) -> Tensor | None:
        """See P2PExchange: this rank's rows of its buffer, for keys and values; None for queries."""
        if index not in READ_CHANNELS:
            return None
        self._reserve(like_BLC)
        return self._own_rows(self.rank, index, like_BLC)

    def send_qkv(self, index: int, x_BLHD: Tensor) -> None:
        """See P2PExchange."""
        if index not in READ_CHANNELS:
            return
        self._reserve(x_BLHD)
        self.memory.copy_wait_compute()
        for rank in other_ranks(len(self.lengths), self.rank):
            self.memory.copy_wait(rank, READ_CHANNELS[index])
            self.memory.copy(x_BLHD, self._own_rows(rank, index, x_BLHD))
            self.memory.signal(rank, index)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, local_attention: AttentionFn, call: AttentionCall) -> Tensor:
        """See P2PExchange."""
        for index, x_BLHD in ((KEYS, k), (VALUES, v)):
            own_BLHD = self._own_rows(self.rank, index, x_BLHD)
            if own_BLHD.data_ptr() != x_BLHD.data_ptr():  # not computed in place
                copy_rows(own_BLHD, x_BLHD)
        for rank, index in product(other_ranks(len(self.lengths), self.rank), READ_CHANNELS):
            self.memory.wait(rank, index)
        whole_k, whole_v = (self._whole(self.rank, index, q) for index in (KEYS, VALUES))
        own = call.part(query=rank_slice(self.lengths, self.rank).start)
        out_BLHD = local_attention(q, whole_k, whole_v, own) if q.numel() else q
        self.memory.wait_copies()  # the caller may overwrite what was sent
        self._signal_read()
        return out_BLHD

    def _reserve(self, like: Tensor) -> None:
        if self.memory.reserve(kv_buffer_bytes(self.lengths, like.shape[2:].numel(), like.itemsize)):
            self._signal_read()

    def _signal_read(self) -> None:
        """Let the other ranks send their next keys and values."""
        signal_all(self.memory, other_ranks(len(self.lengths), self.rank), READ_CHANNELS.values())

    def _whole(self, rank: int, index: int, like: Tensor) -> Tensor:
        """Return all tokens' keys or values `[1, all ranks' L, ...]` in `rank`'s buffer."""
        shape = (1, sum(self.lengths), *like.shape[2:])
        return self.memory.buffer(rank, (index - KEYS) * Size(shape).numel(), shape, like.dtype)

    def _own_rows(self, rank: int, index: int, like: Tensor) -> Tensor:
        """Return this rank's tokens' keys or values `[1, this rank's L, ...]` in `rank`'s buffer."""
        return self._whole(rank, index, like)[:, rank_slice(self.lengths, self.rank)]


def kv_buffer_bytes(lengths: Sequence[int], width: int, itemsize: int) -> int:
    """Return the buffer size in bytes: keys and values of all `sum(lengths)` tokens, of `width` channels each."""
    return 2 * sum(lengths) * width * itemsize
