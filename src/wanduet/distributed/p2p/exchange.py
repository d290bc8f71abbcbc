"""Sequence parallelism between GPUs that write to each other's memory: by exchange of keys and values, or of heads.

Letters in names: B batch (always 1), L tokens, H heads, D channels of a head, C = H x D.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from wanduet.distributed.mesh import Layout
from wanduet.distributed.p2p.heads import P2PUlysses, ulysses_buffer_bytes
from wanduet.distributed.p2p.keys import P2PAllGatherKV, kv_buffer_bytes
from wanduet.distributed.p2p.memory import PeerMemory
from wanduet.kernels.attention.backends import AttentionFn
from wanduet.kernels.attention.call import AttentionCall


class P2PExchange(Protocol):
    """Attention to a sequence that is split over several ranks."""

    def qkv_buffer(self, index: int, like_BLC: Tensor) -> Tensor | None:
        """Return the contiguous buffer `[1, this rank's L, C]` to compute q (index 0), k (1) or v (2) in; None if any
        memory will do."""

    def send_qkv(self, index: int, x_BLHD: Tensor) -> None:
        """Start to send this rank's q (index 0), k (1) or v (2) `[1, this rank's L, H, D]`.

        Call this once for each of them before `attend`.
        """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, local_attention: AttentionFn, call: AttentionCall) -> Tensor:
        """Return attention of this rank's queries with all heads, `[1, this rank's L, H, D]`.

        q, k and v must have been passed to `send_qkv`. `local_attention` is called one or more times, with some queries
        and all ranks' keys and values of the same heads. `call` describes the attention of all ranks.
        """


def p2p_exchange(
    layout: Layout, memory: PeerMemory, lengths: Sequence[int], rank: int, always_ulysses: bool = False
) -> P2PExchange:
    """Return the exchange for `rank` of a layout's Ulysses group, whose ranks have `lengths` tokens and share `memory`.

    Two ranks gather keys and values: this exchanges as much as heads would, and waits less. More than two ranks, and
    ranks with a ring, exchange heads, as do all ranks with `always_ulysses`.
    """
    if always_ulysses or not _gathers_kv(layout):
        # In a ring, keys and values would travel again for every part of the queries.
        return P2PUlysses(memory, lengths, rank, single_call=layout.ring > 1)
    return P2PAllGatherKV(memory, lengths, rank)


def p2p_buffer_bytes(layout: Layout, lengths: Sequence[int], width: int, itemsize: int) -> int:
    """Return the buffer size in bytes that `p2p_exchange` needs, for ranks that have `lengths` tokens.

    `width` is the number of channels of a token, `itemsize` the bytes of each.
    """
    return (kv_buffer_bytes if _gathers_kv(layout) else ulysses_buffer_bytes)(lengths, width, itemsize)


def _gathers_kv(layout: Layout) -> bool:
    return layout.ulysses == 2 and layout.ring == 1
