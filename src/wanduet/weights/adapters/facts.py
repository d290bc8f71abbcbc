"""What a LoRA file's header says: rank, alpha, targets, and which model it fits."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from wanduet.errors import ModelNotFoundError, WeightsError
from wanduet.family.distilled import FewStep, by_lora
from wanduet.family.registry import MEMBERS
from wanduet.weights.adapters.build import facts_of
from wanduet.weights.adapters.files import AdapterFile, open_adapter
from wanduet.weights.adapters.keys import Keys, sort_keys
from wanduet.weights.adapters.layout import Shape, hidden_size, incomplete
from wanduet.weights.adapters.modules import find_module, is_image_module, official_name
from wanduet.weights.source import some_of

_TITLES = ("modelspec.title", "ss_output_name", "title", "name")

Number = TypeVar("Number", int, float)


def describe_adapter(path: Path) -> dict[str, Any]:
    """Return what a LoRA is, as JSON values; reads its header and its alphas alone.

    `rank`, `alpha`: [lowest, highest], or None. `targets`: number of modules by their official names in a block, or
    outside of blocks. `blocks`: number of blocks with an update. `fits`: the known models of its size. `few_step`: name
    of a known few-step LoRA, or None. `unmatched`: number of tensors that belong to no module of Wan; a file with any is
    refused when it is read. Raises ModelNotFoundError for a file that does not exist or is no LoRA for Wan, WeightsError
    for a damaged one.
    """
    file = open_adapter(path)
    keys = sorted_keys(file)
    given = tensor_shapes(file, keys)
    names = alpha_names(file, keys)
    read = file.read(list(names.values()))
    facts = [
        facts_of(module, found, float(read[names[module]]) if module in names else None, file.config)
        for module, found in given.items()
    ]
    blocks = {int(match[1]) for module in given if (match := re.match(r"blocks\.(\d+)\.", module))}
    hidden = hidden_size(given)
    few_step = few_step_of(file)
    return {
        "name": file.name,
        "bytes": file.weights.stat().st_size,
        "kinds": sorted({kind for one in facts for kind in one.kinds}),
        "rank": range_of(one.rank for one in facts),
        "alpha": range_of(one.alpha for one in facts),
        "targets": dict(Counter(re.sub(r"^blocks\.\d+\.", "", official_name(module)) for module in given)),
        "blocks": len(blocks),
        "hidden_size": hidden,
        "fits": [
            member.spec.name
            for member in MEMBERS
            if member.spec.transformer.dim == hidden and max(blocks, default=0) < member.spec.transformer.num_layers
        ],
        "few_step": few_step.name if few_step else None,
        "ignored": dict(keys.ignored),
        "unmatched": len(keys.unknown) + len(keys.plain),
    }


def sorted_keys(file: AdapterFile) -> Keys:
    """Return a LoRA's tensor names by what they mean.

    Raises ModelNotFoundError if nothing is a LoRA for Wan, WeightsError for kinds that are not supported.
    """
    keys = sort_keys(file.shapes)
    if keys.refused:
        raise WeightsError(
            f"{file.path} has tensors of a kind that wanduet does not read: {some_of(keys.refused)}.",
            hint="It reads LoRA, LoHa, LoKr, DoRA and whole differences.",
        )
    if not keys.groups:
        raise ModelNotFoundError(
            f"{file.path} {_why_not(file, keys)}.",
            hint="A LoRA for Wan2.1 is needed. What a file is: wanduet inspect FILE",
        )
    if keys.experts == {"1", "2"} or (keys.experts and keys.twice):
        raise WeightsError(f"{file.path} is for the two transformers of Wan2.2 A14B; this model has one.")
    named = ((meaning, name) for group in keys.groups.values() for meaning, name in group.items())
    if empty := [n for meaning, n in named if 0 in file.shapes[n] or not (file.shapes[n] or meaning == "alpha")]:
        raise WeightsError(f"{file.path} is damaged: there is no matrix or vector in {some_of(empty)}.")
    for module, shapes in tensor_shapes(file, keys).items():
        if not is_image_module(module) and (problem := incomplete(shapes)):
            raise WeightsError(f"{file.path}: {module} {problem}: {', '.join(sorted(keys.groups[module].values()))}.")
    if file.config.dora and not any({"magnitude", "dora_scale"} & set(group) for group in keys.groups.values()):
        raise WeightsError(f"{file.path} is a DoRA by its config, but has no magnitudes.")
    return keys


def tensor_shapes(file: AdapterFile, keys: Keys) -> dict[str, dict[str, Shape]]:
    """Return the shapes of each module's tensors, by what they mean."""
    return {
        module: {meaning: file.shapes[name] for meaning, name in group.items()} for module, group in keys.groups.items()
    }


def alpha_names(file: AdapterFile, keys: Keys) -> dict[str, str]:
    """Return the names of the alphas in a file, by module."""
    named = {module: group["alpha"] for module, group in keys.groups.items() if "alpha" in group}
    return {module: name for module, name in named.items() if all(size == 1 for size in file.shapes[name])}


def few_step_of(file: AdapterFile) -> FewStep | None:
    """Return how a known few-step LoRA is sampled; None for others."""
    return by_lora([file.name, file.weights.stem, *(str(file.metadata.get(title, "")) for title in _TITLES)])


def range_of(values: Iterable[Number | None]) -> tuple[Number, Number] | None:
    """Return the lowest and the highest of the values that are not None."""
    listed = [value for value in values if value is not None]
    return (min(listed), max(listed)) if listed else None


def _why_not(file: AdapterFile, keys: Keys) -> str:
    if any(find_module(name) or find_module(name.rpartition(".")[0]) for name in keys.plain):
        return "is a whole model, not a LoRA"
    if keys.ignored and not keys.plain and not keys.unknown:
        return f"changes nothing in a transformer: all its tensors are {' or '.join(keys.ignored)}"
    names = sorted((*keys.unknown, *keys.plain))
    return f"is no LoRA for Wan: none of its {len(file.shapes)} tensors belongs to Wan's transformer ({some_of(names)})"
