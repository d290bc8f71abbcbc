"""The linear layer of the transformer's blocks, whose matrix may be in a smaller format."""

import torch.nn.functional as F
from torch import Tensor, nn

from wanduet.kernels.dit.weight import Weight


class Linear(nn.Linear):
    """`nn.Linear` with a matrix in any `WeightFormat`; `weight_scale` `[O, 1]` float32 is None for one without scales."""

    weight_scale: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_parameter("weight_scale", None)

    @property
    def stored(self) -> Weight:
        """The matrix as it is in memory."""
        return Weight(self.weight, self.weight_scale)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., I]` to `[..., O]`, computed in x's dtype."""
        return F.linear(x, self.stored.dense(x.dtype), self.bias)
