"""Makes the updates of one module from its tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wanduet.weights.adapters.config import AdapterConfig
from wanduet.weights.adapters.layout import LOHA, Shape, product_of
from wanduet.weights.adapters.updates import Difference, DoRA, LoHa, LoKr, LoRA, Several, Update

if TYPE_CHECKING:  # headers are read and checked before torch is imported
    from torch import Tensor


@dataclass(frozen=True)
class Facts:
    """What one module's tensors are.

    `kinds`: of `lora`, `loha`, `lokr`, `dora`, `diff`. `rank`, `alpha`: None where it has none. `scale`: factor of the product.
    """

    kinds: tuple[str, ...]
    rank: int | None
    alpha: float | None
    scale: float


def facts_of(module: str, shapes: Mapping[str, Shape], stored: float | None, config: AdapterConfig) -> Facts:
    """Return what one module's tensors are. `shapes`: by what they mean. `stored`: its alpha in the file, or None."""
    kinds = [
        kind
        for kind, mark in (("lora", "down"), ("loha", "hada_w1_b"), ("lokr", "lokr_w1"), ("diff", "diff"))
        if any(name.startswith(mark) for name in shapes)
    ]
    kinds += ["dora"] if "magnitude" in shapes or "dora_scale" in shapes else []
    rank: int | None = None
    if "down" in shapes:
        rank = shapes["down"][0]
    elif "hada_w1_b" in shapes:
        rank = shapes["hada_w1_b"][0]
    elif "lokr" in kinds:
        rank = product_of(shapes, "lokr_w2")[1] or product_of(shapes, "lokr_w1")[1]
        if rank is None:  # LyCORIS stores an alpha that it does not use; PEFT divides its config's
            stored, rank = None, config.configured_rank(module)
    if rank is None:
        return Facts(tuple(kinds), None, None, 1.0)
    scale, alpha = config.scale(module, rank, stored)
    return Facts(tuple(kinds), rank, alpha, scale)


def updates_of(
    module: str, tensors: "Mapping[str, Tensor]", facts: Facts, shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, Update]]:
    """Yield a module's updates with the parameters' names.

    `tensors`: by what they mean. `shapes`: of the model's parameters.
    """
    parameter = module if module in shapes else f"{module}.weight"
    changes = list(_changes(tensors, facts, shapes[parameter])) if parameter in shapes else []
    if changes:
        yield parameter, changes[0] if len(changes) == 1 else Several(changes)
    bias = f"{module}.bias"
    biases: list[Update] = [
        Difference(shapes[bias], tensors[name], scale)
        for name, scale in (("diff_b", 1.0), ("up_bias", facts.scale))  # PEFT scales the bias of B as it does B
        if name in tensors
    ]
    if biases:
        yield bias, biases[0] if len(biases) == 1 else Several(biases)


def _changes(tensors: "Mapping[str, Tensor]", facts: Facts, shape: Shape) -> Iterator[Update]:
    products: list[LoRA | LoHa | LoKr] = []
    if "down" in tensors:
        products.append(LoRA(shape, tensors["down"], tensors["up"], facts.scale))
    if LOHA[0] in tensors:
        first, second, third, fourth = (tensors[name].flatten(1) for name in LOHA)
        products.append(LoHa(shape, (first, second, third, fourth), facts.scale))
    if any(name.startswith("lokr_") for name in tensors):
        w1, w2 = (_factors(tensors, name) for name in ("lokr_w1", "lokr_w2"))
        products.append(LoKr(shape, w1, w2, facts.scale))
    magnitude = tensors.get("dora_scale", tensors.get("magnitude"))
    if magnitude is not None and ("magnitude" in tensors or magnitude.ndim != len(shape)):  # one of each output
        magnitude = magnitude.reshape(-1, *(1 for _ in shape[1:]))
    for product in products:
        yield product if magnitude is None else DoRA(product, magnitude)
    if "diff" in tensors:
        yield Difference(shape, tensors["diff"])


def _factors(tensors: "Mapping[str, Tensor]", name: str) -> "tuple[Tensor, ...]":
    return (tensors[name],) if name in tensors else (tensors[f"{name}_a"], tensors[f"{name}_b"])
