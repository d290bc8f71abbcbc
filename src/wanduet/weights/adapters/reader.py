"""Reads a LoRA file as updates of a transformer's parameters."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wanduet.errors import ModelNotFoundError, WeightsError
from wanduet.family.registry import MEMBERS
from wanduet.family.spec import TransformerSpec
from wanduet.weights.adapters.adapter import Adapter
from wanduet.weights.adapters.build import Facts, facts_of, updates_of
from wanduet.weights.adapters.facts import alpha_names, few_step_of, sorted_keys, tensor_shapes
from wanduet.weights.adapters.files import AdapterFile, open_adapter
from wanduet.weights.adapters.keys import Keys
from wanduet.weights.adapters.layout import check_shapes, hidden_size
from wanduet.weights.adapters.modules import is_image_module
from wanduet.weights.adapters.updates import Update
from wanduet.weights.source import some_of

if TYPE_CHECKING:  # headers are read and checked before torch is imported
    from torch import Tensor

IMAGE = "of image conditioning, which a text-to-video model does not have"
_LISTED = 20  # names in a message


@dataclass(frozen=True)
class AdapterHeader:
    """What a LoRA file adds to a plan, from its header: bytes of the tensors that are used, and the updated parameters."""

    num_bytes: int
    updates: Mapping[str, object]


def measure_adapter(path: Path, transformer: TransformerSpec, shapes: Mapping[str, tuple[int, ...]]) -> AdapterHeader:
    """Return the size of what `read_adapter` would read; reads no tensors, and raises as it does for what the header
    shows."""
    import torch

    file, keys, given = _checked(path, transformer, shapes)
    used = [name for group in keys.groups.values() for name in group.values()]
    tensors = {name: torch.empty(file.shapes[name], device="meta") for name in used}
    facts = {module: facts_of(module, given[module], None, file.config) for module in keys.groups}
    return AdapterHeader(sum(file.num_bytes[name] for name in used), _updates(keys, tensors, facts, shapes))


def read_adapter(path: Path, transformer: TransformerSpec, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """Read a LoRA: a .safetensors file, a .pt, .pth, .bin or .ckpt file of tensors alone, or a PEFT folder.

    `shapes`: of the transformer's parameters, by their names in the Diffusers checkpoint. Raises ModelNotFoundError for
    a file that does not exist or is no LoRA, WeightsError for a damaged one or one that does not fit the transformer.
    Everything that the header shows is checked before tensors are read.
    """
    file, keys, given = _checked(path, transformer, shapes)
    tensors = file.read([name for group in keys.groups.values() for name in group.values()])
    _require_equal(path, keys, file, tensors)
    alphas = {module: float(tensors[name]) for module, name in alpha_names(file, keys).items()}
    facts = {module: facts_of(module, given[module], alphas.get(module), file.config) for module in keys.groups}
    return Adapter(
        path=path,
        name=file.name,
        sha256=file.sha256(),
        updates=_updates(keys, tensors, facts, shapes),
        ignored=dict(keys.ignored),
        num_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        few_step=few_step_of(file),
    )


def _checked(
    path: Path, transformer: TransformerSpec, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[AdapterFile, Keys, dict[str, dict[str, tuple[int, ...]]]]:
    """Open a file and check its header. Return it, its names, and the shapes by module and meaning."""
    file = open_adapter(path)
    keys = sorted_keys(file)
    hidden = hidden_size(tensor_shapes(file, keys))
    if hidden not in (None, transformer.dim):
        raise WeightsError(
            f"{path} is made for {_member(hidden)}; this model has {transformer.dim}.",
            hint="A LoRA fits only models of the size that it was trained on.",
        )
    _leave_out_images(keys, shapes)
    _require_matches(path, keys, shapes)
    given = tensor_shapes(file, keys)
    for module, found in given.items():
        check_shapes(path, module, found, (shapes[_parameter(module, shapes)], shapes.get(f"{module}.bias")))
    return file, keys, given


def _updates(
    keys: Keys, tensors: "Mapping[str, Tensor]", facts: Mapping[str, Facts], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Update]:
    found: dict[str, Update] = {}
    for module, group in keys.groups.items():
        own = {meaning: tensors[name] for meaning, name in group.items()}
        found.update(updates_of(module, own, facts[module], shapes))
    return found


def _parameter(module: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    return module if module in shapes else f"{module}.weight"


def _leave_out_images(keys: Keys, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Move the tensors of image modules, which the model does not have, to the ignored ones."""
    for module in [module for module in keys.groups if is_image_module(module)]:
        if _parameter(module, shapes) not in shapes:
            keys.ignored[IMAGE] += len(keys.groups.pop(module))


def _require_matches(path: Path, keys: Keys, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise WeightsError if tensors belong to no parameter of the model, or none is left."""
    absent = [module for module in keys.groups if _parameter(module, shapes) not in shapes]
    left = [*keys.unknown, *keys.plain, *(name for module in absent for name in keys.groups[module].values())]
    if left:
        raise WeightsError(
            f"{path} has {len(left)} tensors that match nothing in the model: {some_of(sorted(left), _LISTED)}.",
            hint="It was made for another model, or by a trainer whose names are not known. Nothing of it was used.",
        )
    if not keys.groups:
        raise ModelNotFoundError(
            f"{path} changes nothing in this model: all its tensors are {' or '.join(keys.ignored)}."
        )


def _require_equal(path: Path, keys: Keys, file: AdapterFile, tensors: "Mapping[str, Tensor]") -> None:
    """Raise WeightsError if a file says two different things of one tensor (in two vocabularies)."""
    pairs = [(first, second) for first, second in keys.twice if first in tensors]
    others = file.read([second for _, second in pairs])
    if wrong := [f"{first} and {second}" for first, second in pairs if not tensors[first].equal(others[second])]:
        raise WeightsError(f"{path} has tensors that mean the same and differ: {some_of(wrong)}.")


def _member(hidden: int | None) -> str:
    names: Iterable[str] = (m.spec.name.rpartition("-")[2] for m in MEMBERS if m.spec.transformer.dim == hidden)
    name = next(iter(names), None)
    return f"{name} (hidden size {hidden})" if name else f"another model, of hidden size {hidden}"
