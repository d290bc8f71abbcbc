"""Memory that a transformer's blocks take turns to use, one product's result after the other.

Letters in names: B batch, L tokens, C width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 256  # rows of the largest tiles in which GPUs compute a matrix product


@dataclass(frozen=True, slots=True)
class Workspace:
    """Memory for what lives within a block: q, k and v, or the feed-forward's hidden tensor, of as many tokens as fit.

    `whole` `[B, L, 3C]`, without gradients; with them it is None, and every tensor has its own.
    """

    whole: Tensor | None

    @classmethod
    def allocate_for(cls, x: Tensor, dtype: torch.dtype) -> "Workspace":
        """For tokens `[B, L, C]`, in a dtype."""
        if torch.is_grad_enabled():
            return cls(None)
        return cls(torch.empty(*x.shape[:2], 3 * x.shape[2], dtype=dtype, device=x.device))

    def rows(self, width: int) -> int:
        """So many tokens of this width should be computed at a time: equal parts that fit, at least one token each.

        In whole tiles of a product where that fits too: a tile that is not full takes as long as one that is.
        """
        assert self.whole is not None
        tokens, fit = self.whole.shape[1], max(1, self.whole[0].numel() // width)
        even = -(-tokens // max(1, -(-tokens // fit)))
        tiled = -(-even // TILE) * TILE
        return max(1, tiled if tiled <= fit else even)

    def thirds(self) -> Sequence[Tensor | None]:
        """Three tensors `[B, L, C]`, each in one piece: to write a product between the rows of others takes a third
        longer, because the bias is then copied to every row first (H100, PyTorch 2.11)."""
        if self.whole is None:
            return (None,) * 3
        batch, tokens, width = self.whole.shape
        return self.whole.view(3, batch, tokens, width // 3).unbind()

    def part(self, like: Tensor, width: int) -> Tensor | None:
        """Its front as `[B, tokens of like, width]`; None where that does not fit."""
        batch, tokens = like.shape[:2]
        size = batch * tokens * width
        if self.whole is None or size > self.whole.numel():
            return None
        return self.whole.view(-1)[:size].view(batch, tokens, width)
