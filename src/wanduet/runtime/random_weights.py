"""Weights for a model that has none (`random:1.3b`): the true shapes, to plan and to measure with."""

from collections.abc import Mapping

import torch
from torch import Tensor


def randomise(parameters: Mapping[str, Tensor]) -> None:
    """Random weights of the true shapes: norms of one, small matrices, so that activations stay finite.

    The same ones each time, on devices of one kind.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for seed, (name, parameter) in enumerate(sorted(parameters.items())):
        if parameter.ndim == 1 or "gamma" in name:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            generator = generators.setdefault(parameter.device, torch.Generator(parameter.device))
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator.manual_seed(seed))
