"""Self-attention of a block that is trained to be sparse: VSA with its gate, SLA with its projection.

`kernels.attention.trained` computes it for some heads of all tokens; here it gets the block's own module. Letters in names are
as in `models.dit.model`; M tiles.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from wanduet.distributed.sequence.sharding import Sharding
from wanduet.family.spec import TransformerSpec
from wanduet.kernels.attention.backends import AttentionFn
from wanduet.kernels.attention.call import AttentionCall
from wanduet.kernels.attention.trained import TrainedSparse
from wanduet.models.dit.token_order import tile_order


@dataclass(frozen=True, slots=True)
class SLAttention:
    """An `AttentionFn`: SLA with a block's projection; `dense` where it leaves no key out."""

    sparse: TrainedSparse
    dense: AttentionFn
    spec: TransformerSpec
    projection: nn.Linear

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """Return attention `[B, L, H, D]` of all tokens with some heads."""
        weights = self.projection.weight, self.projection.bias
        return self.sparse.sla((q, k, v), weights, self.spec.key_share, self.dense, call)


@dataclass(frozen=True, slots=True)
class VSAttention:
    """An `AttentionFn`: VSA's fine part; `dense` where it leaves no tile out. The coarse part of the heads that this device
    computes, one call after the other, is kept for `add_coarse`: a number for each tile instead of each token."""

    sparse: TrainedSparse
    dense: AttentionFn
    spec: TransformerSpec
    coarse: list[Tensor] = field(default_factory=list)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """Return the fine part `[B, L, H, D]` of all tokens, in the order of tiles, with some heads."""
        tiles = tile_order(call.grid, q.device).blocks
        fine, coarse_BHMD = self.sparse.vsa((q, k, v), tiles, self.spec.key_share, self.dense, call)
        self.coarse.append(coarse_BHMD)
        return fine

    def add_coarse(
        self, heads_BLC: Tensor, gate_BLC: Tensor, call: AttentionCall, sharding: Sharding, out: Tensor | None
    ) -> Tensor:
        """Return the fine part of this device's tokens and all heads with `coarse * gate` added; in place without gradients.

        `out`: memory of that shape for the coarse part of each token; None allocates it.
        """
        coarse_BHMD = sharding.gather_heads(torch.cat(self.coarse, dim=1), 1)
        coarse_BMC = coarse_BHMD.transpose(1, 2).flatten(2).to(heads_BLC.dtype)
        tiles = sharding.shard_sequence(tile_order(call.grid, heads_BLC.device).tiles, 0)
        if torch.is_grad_enabled():
            return heads_BLC + gate_BLC * coarse_BMC[:, tiles]
        coarse_BLC = torch.index_select(coarse_BMC, 1, tiles, out=out)
        return heads_BLC.addcmul_(gate_BLC, coarse_BLC)
