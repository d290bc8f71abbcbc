"""Opens a LoRA: a safetensors file, a PyTorch file of tensors alone, or a PEFT folder."""

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanduet.errors import ModelNotFoundError, WeightsError
from wanduet.untrusted import cut, describe_file, open_regular, read_safetensors_header
from wanduet.weights.adapters.config import AdapterConfig, parse_config, parse_metadata
from wanduet.weights.json_files import read_json
from wanduet.weights.pickles import load_tensors
from wanduet.weights.safetensors import TensorFiles
from wanduet.weights.source import FETCH_MODEL, some_of

if TYPE_CHECKING:  # headers are read and checked before torch is imported
    from torch import Tensor

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
CONFIG = "adapter_config.json"
_FETCH_LORA = "Fetch the LoRA's file again, and compare its size with that on the page it came from."
# In a folder: PEFT's and diffusers' names.
_WEIGHTS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class AdapterFile:
    """An open LoRA; no tensor is read yet. `path`: as given. `weights`: the file of the tensors. `config_path`: the PEFT
    config that belongs to it, if any."""

    path: Path
    weights: Path
    config_path: Path | None

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor. Raises WeightsError for a damaged file."""
        if self._pickled is not None:
            return {name: tuple(tensor.shape) for name, tensor in self._pickled.items()}
        return self._safetensors.shapes

    @cached_property
    def num_bytes(self) -> dict[str, int]:
        """Bytes of every tensor. Raises WeightsError for a damaged file."""
        if self._pickled is not None:
            return {name: tensor.nbytes for name, tensor in self._pickled.items()}
        return {name: info.num_bytes for name, info in self._safetensors.tensors.items()}

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """The metadata of a safetensors header; empty for other files."""
        _ = self.shapes  # reports a damaged header
        found = {} if self._pickled is not None else read_safetensors_header(self.weights).get("__metadata__", {})
        return found if isinstance(found, dict) else {}

    @cached_property
    def config(self) -> AdapterConfig:
        """The alpha and rank rules that come with the file. Raises WeightsError for invalid ones."""
        if self.config_path is not None:
            return parse_config(self.config_path, read_json(self.config_path))
        return parse_metadata(self.weights, self.metadata)

    @cached_property
    def name(self) -> str:
        """The file's name without its ending; the folder's name for a PEFT folder."""
        return self.path.name if self.path.is_dir() else self.path.stem

    def sha256(self) -> str:
        """Return the hash of the file; with a PEFT config, of the text of both files' hashes."""
        digests = [_sha256(file) for file in (self.weights, self.config_path) if file is not None]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def read(self, names: Collection[str]) -> "dict[str, Tensor]":
        """Return copies of tensors in the stored dtype; the file is not mapped afterwards.

        Raises WeightsError for a damaged file, and for whole numbers or NaN or infinity among them.
        """
        with self._as_lora():
            return self._read(names)

    def _read(self, names: Collection[str]) -> "dict[str, Tensor]":
        source = self._pickled.items() if self._pickled is not None else self._safetensors.iterate(names)
        wanted, found, wrong = set(names), {}, []
        for name, tensor in source:
            if name in wanted:
                found[name] = tensor.detach().clone()
                is_number = tensor.is_floating_point() or tensor.numel() == 1  # an alpha may be a whole number
                if not is_number or not math.isfinite(sum(map(float, tensor.float().aminmax()))):
                    wrong.append(name)
        if wrong:
            raise WeightsError(f"{self.path} is damaged: NaN, infinity or whole numbers in {some_of(sorted(wrong))}.")
        return found

    @cached_property
    def _safetensors(self) -> TensorFiles:
        with self._as_lora():
            return TensorFiles("LoRA", [self.weights])

    @cached_property
    def _pickled(self) -> "dict[str, Tensor] | None":
        """The tensors of a PyTorch file, mapped; None for a safetensors file."""
        with self._as_lora():
            return load_tensors(self.weights) if self.weights.suffix.lower() in PICKLES else None

    @contextmanager
    def _as_lora(self) -> Iterator[None]:
        """Say what to do about a damaged LoRA, also where it is in a model's folder or the hub's cache."""
        try:
            yield
        except WeightsError as error:
            if error.hint is not None:
                error.hint = error.hint.replace(FETCH_MODEL, _FETCH_LORA)
            raise


def open_adapter(path: Path) -> AdapterFile:
    """Find the files of a LoRA; reads none. Raises ModelNotFoundError if there are none."""
    if path.is_dir():
        weights = next((path / name for name in _WEIGHTS if (path / name).exists()), None)
        if weights is None:
            raise ModelNotFoundError(
                f"The folder {path} has no LoRA of PEFT: none of {', '.join(_WEIGHTS)}.",
                hint="Give the .safetensors file itself.",
            )
    elif path.exists():
        weights = path
    else:
        raise ModelNotFoundError(f"There is no LoRA file {path}.")
    if weights.suffix.lower() not in (*PICKLES, ".safetensors"):
        try:
            kind = describe_file(weights) or "of an unknown type"
        except OSError as error:
            raise WeightsError(f"Cannot read {weights}: {error.strerror or cut(error)}.") from error
        if kind != "a safetensors file":
            raise ModelNotFoundError(f"{weights} is no LoRA: it is {kind}.", hint="A LoRA is a .safetensors file.")
    config = weights.parent / CONFIG
    return AdapterFile(path, weights, config if weights.stem == "adapter_model" and config.exists() else None)


def _sha256(path: Path) -> str:
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"Cannot read {path}: {error.strerror or cut(error)}.") from error
