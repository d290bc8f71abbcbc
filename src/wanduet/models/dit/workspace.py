"""Memory that the products within a transformer block use one after another.

Letters in names: B batch, L tokens, C width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of the largest tiles in which GPUs compute a matrix product; and of the smallest part of a tile.
TILE, PART = 256, 16


@dataclass(frozen=True, slots=True)
class Workspace:
    """A buffer for results that live within one block: q, k and v, or the feed-forward's hidden tensor.

    `whole` `[B, L, 3C]`; None with gradients enabled, where every result gets memory of its own.
    """

    whole: Tensor | None

    @classmethod
    def allocate_for(cls, x: Tensor, dtype: torch.dtype) -> "Workspace":
        """A workspace of the given dtype for tokens `x` `[B, L, C]`, on the same device."""
        if torch.is_grad_enabled():
            return cls(None)
        return cls(torch.empty(*x.shape[:2], 3 * x.shape[2], dtype=dtype, device=x.device))

    def chunk_tokens(self, width: int) -> int:
        """How many tokens of `width` channels to compute at a time, at least 1: in equal chunks that fit.

        Rounded up to whole tiles of a matrix product if that fits, as a partial tile takes as long as a full one; else to
        whole parts of a tile: products in 8 bits need operands that are aligned in memory.
        """
        assert self.whole is not None
        tokens, fit = self.whole.shape[1], max(1, self.whole[0].numel() // width)
        even = -(-tokens // max(1, -(-tokens // fit)))
        rounded = (-(-even // rows) * rows for rows in (TILE, PART))
        return max(1, next((tokens for tokens in rounded if tokens <= fit), even))

    def thirds(self) -> Sequence[Tensor | None]:
        """Three contiguous tensors `[B, L, C]`, for q, k and v; None each with gradients enabled.

        Writing a product into strided rows of `[B, L, 3C]` takes a third longer, because PyTorch then copies the bias
        to every row first (H100, PyTorch 2.11).
        """
        if self.whole is None:
            return (None,) * 3
        batch, tokens, width = self.whole.shape
        return self.whole.view(3, batch, tokens, width // 3).unbind()

    def part(self, like: Tensor, width: int) -> Tensor | None:
        """The front of the buffer as `[B, L, width]`, with B and L of `like`; None if it does not fit."""
        batch, tokens = like.shape[:2]
        size = batch * tokens * width
        if self.whole is None or size > self.whole.numel():
            return None
        return self.whole.view(-1)[:size].view(batch, tokens, width)

    def part_and_bytes(self, batch: int, tokens: int, width: int) -> tuple[Tensor, Tensor]:
        """The front of the buffer as `[batch, tokens, width]`, and its end as uint8 of the same shape; the caller makes sure
        that both fit."""
        assert self.whole is not None
        flat, size = self.whole.view(-1), batch * tokens * width
        return flat[:size].view(batch, tokens, width), flat.view(torch.uint8)[-size:].view(batch, tokens, width)
