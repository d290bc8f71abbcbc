"""Describes a file of weights or a LoRA for people: what it is, what it needs beside it, and whether wanduet runs it."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from wanduet.errors import ModelNotFoundError
from wanduet.untrusted import read_safetensors_header
from wanduet.weights.adapters.facts import describe_adapter
from wanduet.weights.components import open_source, why_not
from wanduet.weights.recognise import TAKE_T2V, Recognised, recognise

_ENDINGS = (".safetensors", ".safetensors.index.json", ".pth", ".pt", ".gguf")
_FEW = 2  # tensors in a file of latents or embeddings, at most


def describe_weights(path: Path) -> dict[str, Any] | None:
    """Return what `wanduet inspect` shows of a file of weights; None for a file with another ending, and for latents or
    embeddings.

    Raises WeightsError for a damaged one, or a quantisation that is not read.
    """
    if not path.name.lower().endswith(_ENDINGS) or (path.suffix == ".safetensors" and _has_few(path)):
        return None
    source = open_source(path)
    kinds = recognise(source.tensors)
    if kinds[0].component == "adapter":
        with suppress(ModelNotFoundError):  # one for another model than Wan
            return {"kind": "lora", "path": str(path)} | describe_adapter(path)
    found = {"kind": "weights", "path": str(path)}
    if len(kinds) == 1:
        return found | _shown(kinds[0], path, source.quantisation)
    return found | {"models": [_shown(kind, path, source.quantisation) for kind in kinds]}


def _has_few(path: Path) -> bool:
    """Return True if a safetensors file has few tensors, or a header that cannot be read."""
    try:
        return len(read_safetensors_header(path).keys() - {"__metadata__"}) <= _FEW
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
