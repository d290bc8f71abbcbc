"""How one sequence of tokens is spread over devices. The transformer is given one of these."""

from typing import Protocol

from torch import Tensor

from wanduet.kernels.attention.backends import AttentionFn


class Sharding(Protocol):
    """What the transformer asks of a strategy. `dim` is the sequence's axis."""

    def shard_sequence(self, x: Tensor, dim: int) -> Tensor:
        """This device's part of a whole sequence."""

    def gather_sequence(self, x: Tensor, dim: int) -> Tensor:
        """The whole sequence from every device's part."""

    @property
    def sends_ahead(self) -> bool:
        """Whether `send` has a use: then v, k and q should be computed one after the other, and sent in between."""

    def room(self, index: int, like: Tensor) -> Tensor | None:
        """Where q (index 0), k (1) or v (2) should be computed, as `like` `[B, L, C]`; None where it does not matter."""

    def send(self, index: int, x: Tensor) -> None:
        """q (index 0), k (1) or v (2) `[B, L, H, D]`, of which the next `attend` will be."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFn) -> Tensor:
        """Attention of this device's queries to the whole sequence; all `[B, L, H, D]`."""

    def attend_first(self, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFn) -> Tensor:
        """The same in the first block, before any text is seen: devices with other prompts compute the same."""


class NoSharding:
    """One device holds the whole sequence."""

    def shard_sequence(self, x: Tensor, dim: int) -> Tensor:
        """`x` itself."""
        return x

    def gather_sequence(self, x: Tensor, dim: int) -> Tensor:
        """`x` itself."""
        return x

    @property
    def sends_ahead(self) -> bool:
        """There is nobody to send to."""
        return False

    def room(self, index: int, like: Tensor) -> Tensor | None:
        """Nowhere in particular."""
        return None

    def send(self, index: int, x: Tensor) -> None:
        """Nothing."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFn) -> Tensor:
        """Plain attention."""
        return attention(q, k, v)

    def attend_first(self, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFn) -> Tensor:
        """Plain attention."""
        return attention(q, k, v)
