"""Another format for the blocks' matrices, as a pass over a transformer that has no memory yet.

Embeddings, norms, modulation tables, biases and the head stay as they are. A loader then writes each matrix in its format,
so that no copy of the whole model in 16 bits exists.
"""

import torch
from torch import Tensor, nn

from wanduet.kernels.dit.weight import Weight, WeightFormat
from wanduet.models.dit.linear import Linear
from wanduet.models.dit.model import WanTransformer


def set_format(transformer: WanTransformer, format: WeightFormat) -> None:
    """Give the blocks' matrices of a transformer on the meta device another dtype, and their scales if it has any."""
    for module in transformer.modules():
        if isinstance(module, Linear):
            meta = torch.empty(module.weight.shape, dtype=format.dtype, device="meta")
            module.weight = nn.Parameter(meta, requires_grad=False)
            if format.scaled:
                scale = torch.empty(module.out_features, 1, dtype=torch.float32, device="meta")
                module.weight_scale = nn.Parameter(scale, requires_grad=False)


def load_targets(transformer: WanTransformer) -> dict[str, Tensor | Weight]:
    """Return what a loader fills by `copy_`, by names of a checkpoint: parameters, and matrices that have scales."""
    targets: dict[str, Tensor | Weight] = {name: parameter.data for name, parameter in transformer.named_parameters()}
    for name, module in transformer.named_modules():
        if isinstance(module, Linear) and module.weight_scale is not None:
            del targets[f"{name}.weight_scale"]
            targets[f"{name}.weight"] = module.stored
    return targets
