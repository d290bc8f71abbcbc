"""Reads a LoRA file as updates of a transformer's parameters."""

from collections.abc import Mapping
from pathlib import Path

from wanduet.family.spec import TransformerSpec
from wanduet.weights.adapters.adapter import Adapter


def read_adapter(path: Path, transformer: TransformerSpec, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """Read a LoRA: a .safetensors file, a .pt, .pth or .bin file of tensors alone, or a PEFT folder.

    `shapes`: of the transformer's parameters, by their names in the Diffusers checkpoint. Raises ModelNotFoundError for
    a file that does not exist or is no LoRA, WeightsError for a damaged one or one that does not fit the transformer.
    """
    raise NotImplementedError
