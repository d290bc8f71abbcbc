"""Describes a file of weights for people: what it is, what it needs beside it, and whether wanduet runs it."""

from pathlib import Path
from typing import Any

from wanduet.untrusted import open_regular
from wanduet.weights.components import open_source, why_not
from wanduet.weights.recognise import TAKE_T2V, Recognised, recognise

_STARTS = (b"PK\x03\x04", b"\x80", b"GGUF")  # PyTorch's zip archives and pickles, llama.cpp's files
_ENDINGS = (".safetensors", ".safetensors.index.json", ".pth", ".pt", ".gguf")


def describe_weights(path: Path) -> dict[str, Any] | None:
    """Return what `wanduet inspect` shows of a file of weights; None for a file of another kind.

    Raises WeightsError for a damaged one, ModelNotFoundError for a format that is not read.
    """
    if not str(path).lower().endswith(_ENDINGS):
        with open_regular(path) as file:
            if not file.read(4).startswith(_STARTS):
                return None
    source = open_source(path)
    tensors, kinds = source.tensors, recognise(source.tensors)
    if kinds[0].component == "unknown" and path.suffix == ".safetensors" and len(tensors) <= 2:
        return None  # latents or embeddings
    found = {"kind": "weights", "path": str(path)}
    if len(kinds) == 1:
        return found | _shown(kinds[0], path, source.quantisation)
    return found | {"models": [_shown(kind, path, source.quantisation) for kind in kinds]}


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
