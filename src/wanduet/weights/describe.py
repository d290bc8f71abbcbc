"""Describes a file of weights or a LoRA for people: what it is, what it needs beside it, and whether wanduet runs it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from wanduet.errors import ModelNotFoundError, WeightsError
from wanduet.untrusted import read_safetensors_header
from wanduet.weights.adapters.facts import describe_adapter
from wanduet.weights.components import open_source, why_not
from wanduet.weights.quantised import Dequantised
from wanduet.weights.recognise import TAKE_T2V, Recognised, recognise

_ENDINGS = (".safetensors", ".safetensors.index.json", ".pth", ".pt", ".gguf")
_OWN = {"latents", "prompt_embeds"}  # tensors of files that wanduet writes
_FEW = 2  # tensors in a file of latents or embeddings, at most


def describe_weights(path: Path) -> dict[str, Any] | None:
    """Return what `wanduet inspect` shows of a file of weights; None for a file with another ending, and for latents or
    embeddings.

    Raises WeightsError for a damaged one, or a quantisation that is not read.
    """
    may_be_own = path.suffix.lower() == ".safetensors"
    if not path.name.lower().endswith(_ENDINGS) or (may_be_own and _is_own(path)):
        return None
    source = open_source(path)
    stored = source.source.tensors if isinstance(source, Dequantised) else source.tensors
    kinds = recognise({name: stored[name] for name in source.tensors})
    if may_be_own and kinds[0].component == "unknown" and len(source.tensors) <= _FEW:
        return None
    if kinds[0].component == "adapter":
        try:
            return {"kind": "lora", "path": str(path)} | describe_adapter(path)
        except (ModelNotFoundError, WeightsError) as error:  # one for another model than Wan, for example
            text = error.message.removesuffix(".")
            text = text.removeprefix(f"{path}: ") if text.startswith(f"{path}: ") else text.replace(str(path), "it")
            kinds = (replace(kinds[0], problem=text, hint="Take a LoRA for Wan2.1, or another file of this one."),)
    found = {"kind": "weights", "path": str(path)}
    if len(kinds) == 1:
        return found | _shown(kinds[0], path, source.quantisation)
    return found | {"models": [_shown(kind, path, source.quantisation) for kind in kinds]}


def _is_own(path: Path) -> bool:
    """Return True if a safetensors file has the tensors of latents or embeddings, or a header that cannot be read."""
    try:
        return read_safetensors_header(path).keys() - {"__metadata__"} <= _OWN
    except (OSError, ValueError):
        return True


def _shown(kind: Recognised, path: Path, quantisation: str | None) -> dict[str, Any]:
    problem = why_not(path, kind)
    return {
        "model": kind.described,
        "component": kind.component,
        "layout": kind.layout,
        "prefix": kind.prefix,
        "dtypes": list(kind.dtypes),
        "quantisation": quantisation,
        "tensors": kind.num_tensors,
        "parameters": kind.num_parameters,
        "runs": problem is None,
        "problem": problem,
        "hint": None if problem is None else kind.hint or TAKE_T2V,
        "needs": list(kind.needs),
        "device_bytes": kind.device_bytes,
    }
