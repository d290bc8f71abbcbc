"""Random weights of a model's shapes (`random:1.3b`), for planning and measuring without a checkpoint."""

from collections.abc import Mapping

import torch
from torch import Tensor

from wanduet.kernels.dit.weight import Weight


def randomise(parameters: Mapping[str, Tensor | Weight]) -> None:
    """Fill parameters in place: norm weights with 1, biases with 0, matrices with small random values, so that
    activations stay finite.

    The values are the same in each run on devices of one type.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for seed, (name, target) in enumerate(sorted(parameters.items(), key=lambda item: item[0])):
        parameter = target if isinstance(target, Tensor) else target.data.new_empty(target.shape, dtype=torch.float32)
        if parameter.ndim == 1 or "gamma" in name:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            generator = generators.setdefault(parameter.device, torch.Generator(parameter.device))
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator.manual_seed(seed))
        if target is not parameter:
            target.copy_(parameter)
