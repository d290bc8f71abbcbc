"""Random weights of a model's shapes (`random:1.3b`), for planning and measuring without a checkpoint."""

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from wanduet.kernels.dit.weight import Weight

# Values that are drawn for a larger matrix on a CPU, then repeated: a CPU draws about 100 million in a second, so that 14
# billion would take minutes. A prime, so that no two rows are equal.
DRAWN = 2**20 + 7


def randomise(parameters: Mapping[str, Tensor | Weight]) -> None:
    """Fill parameters in place: norm weights with 1, biases with 0, matrices with small random values, so that
    activations stay finite.

    The values are the same in each run on devices of one type.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for seed, (name, target) in enumerate(sorted(parameters.items(), key=lambda item: item[0])):
        parameter = target if isinstance(target, Tensor) else target.data.new_empty(target.shape, dtype=torch.float32)
        _fill(parameter, name, seed, generators)
        if target is not parameter:
            target.copy_(parameter)


class RandomSource:
    """The values that `randomise` gives to parameters, for reading them again."""

    def __init__(self, parameters: Mapping[str, Tensor | Weight]) -> None:
        """`parameters`: where they are when `randomise` fills them; the values depend on the device's type."""
        self._like: dict[str, tuple[int, torch.Size, torch.dtype, torch.device]] = {}
        for seed, (name, target) in enumerate(sorted(parameters.items(), key=lambda item: item[0])):
            data, dtype = (target, target.dtype) if isinstance(target, Tensor) else (target.data, torch.float32)
            self._like[name] = (seed, data.shape, dtype, data.device)

    def iterate(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield `(name, tensor)` of the named parameters."""
        generators: dict[torch.device, torch.Generator] = {}
        for name in names:
            seed, shape, dtype, device = self._like[name]
            yield name, _fill(torch.empty(shape, dtype=dtype, device=device), name, seed, generators)


def _fill(parameter: Tensor, name: str, seed: int, generators: dict[torch.device, torch.Generator]) -> Tensor:
    """Fill a parameter with its values; `generators` are those of the devices so far."""
    if parameter.ndim == 1 or "gamma" in name:
        return parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    generator = generators.setdefault(parameter.device, torch.Generator(parameter.device)).manual_seed(seed)
    if parameter.device.type != "cpu" or parameter.numel() <= DRAWN or not parameter.is_contiguous():
        return parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
    flat = parameter.view(-1)
    drawn = flat[:DRAWN].normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
    for start in range(DRAWN, len(flat), DRAWN):
        part = flat[start : start + DRAWN]
        part.copy_(drawn[: len(part)])
    return parameter
