"""The interface between the transformer and sequence or CFG parallelism.

Letters in names: B batch, L tokens, H heads, D channels of a head, C = H x D.
"""

from typing import Protocol

from torch import Tensor

from wanduet.kernels.attention.backends import AttentionFn
from wanduet.kernels.attention.call import AttentionCall


class Sharding(Protocol):
    """Distributes one sequence of tokens over ranks. `dim` is the sequence's axis."""

    def shard_sequence(self, x: Tensor, dim: int) -> Tensor:
        """Return this rank's part of the whole sequence `x`."""

    def gather_sequence(self, x: Tensor, dim: int) -> Tensor:
        """Return the whole sequence, of which `x` is this rank's part."""

    def gather_heads(self, x: Tensor, dim: int) -> Tensor:
        """Return a tensor for all heads, of which `x` is that for the heads whose attention this rank computes in `attend`."""

    @property
    def overlaps_projections(self) -> bool:
        """Whether exchanges overlap the projections of q, k and v.

        If True, compute v, k and q one after the other, and pass each to `send_qkv` before computing the next.
        """

    def qkv_buffer(self, index: int, like: Tensor) -> Tensor | None:
        """Return the buffer `[B, L, C]` to compute q (index 0), k (1) or v (2) in; None if any memory will do."""

    def send_qkv(self, index: int, x: Tensor) -> None:
        """Start to send q (index 0), k (1) or v (2) `[B, L, H, D]` of the next `attend`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFn, call: AttentionCall) -> Tensor:
        """Return attention of this rank's queries to the whole sequence; all `[B, L, H, D]`.

        `call` describes the attention of all ranks; `attention` gets the part of it that it computes.
        """

    def attend_first_block(
        self, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFn, call: AttentionCall
    ) -> Tensor:
        """Return `attend` for the first block. Its inputs do not depend on the prompt yet, so that ranks with different
        prompts may share the work."""


class NoSharding:
    """A `Sharding` for one device, which has the whole sequence."""

    def shard_sequence(self, x: Tensor, dim: int) -> Tensor:
        """Return `x` itself."""
        return x

    def gather_sequence(self, x: Tensor, dim: int) -> Tensor:
        """Return `x` itself."""
        return x

    def gather_heads(self, x: Tensor, dim: int) -> Tensor:
        """Return `x` itself."""
        return x

    @property
    def overlaps_projections(self) -> bool:
        """False: nothing is exchanged."""
        return False

    def qkv_buffer(self, index: int, like: Tensor) -> Tensor | None:
        """Return None."""
        return None

    def send_qkv(self, index: int, x: Tensor) -> None:
        """Do nothing."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFn, call: AttentionCall) -> Tensor:
        """Return `attention(q, k, v, call)`."""
        return attention(q, k, v, call)

    def attend_first_block(
        self, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFn, call: AttentionCall
    ) -> Tensor:
        """Return `attention(q, k, v, call)`."""
        return attention(q, k, v, call)
