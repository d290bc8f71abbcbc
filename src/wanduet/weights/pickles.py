"""Reads the state dictionaries that PyTorch has written (`.pth`, `.pt`), without running code from them.

A training script saves several, by the name of each model (`{"generator": …, "generator_ema": …}`), and other objects
beside them. Their tensors then have the model's name before their own.
"""

import hashlib
import pickle
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast
from zipfile import ZIP_STORED, ZipFile

from wanduet.errors import WeightsError
from wanduet.untrusted import check_regular, cut, open_regular
from wanduet.weights.safetensors import DTYPES, portions, samples
from wanduet.weights.source import TensorInfo, WeightSource, fetch_again

if TYPE_CHECKING:  # other headers are read before torch is imported
    from torch import Tensor

_MOST_BYTES = 16 * 2**20  # of the pickled description of the tensors; that of UMT5-XXL has 0.1 MiB
_INSTEAD = "Take the same weights as .safetensors, or save the state dictionary of their tensors again."
# Parts of names that PyTorch's wrappers of modules add.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class PickledTensors(WeightSource):
    """The tensors of one file that `torch.save` wrote from dictionaries of tensors, by their names in the modules.

    The file is memory-mapped, only during a read. Only tensors are unpickled: PyTorch refuses anything else unread.
    """

    def __init__(self, name: str, path: Path) -> None:
        """Read the tensors' descriptions. Raises WeightsError for another object, or a damaged file."""
        super().__init__(name)
        self.path = path
        with self._opened() as state:
            self.tensors = {
                key: TensorInfo(path, tuple(tensor.shape), DTYPES[str(tensor.dtype)], tensor.nbytes)
                for key, tensor in state.items()
            }

    def iterate(self, names: Collection[str]) -> "Iterator[tuple[str, Tensor]]":
        """Yield the named tensors, memory-mapped. Raises WeightsError."""
        wanted = [name for name in self.tensors if name in set(names)]
        for portion in portions(wanted, self.tensors) if wanted else ():
            with self._opened() as state:
                for name in portion:
                    yield name, state[name]

    def fingerprint(self) -> str:
        """Return a digest of the tensors' descriptions, of samples of the file and of its end, which has a checksum of
        every tensor; reads a few MiB."""
        described = [(name, info.shape, info.dtype) for name, info in self.tensors.items()]
        digest = hashlib.sha256(f"{self.path.name}{described}".encode())
        size = check_regular(self.path)
        with open_regular(self.path) as file:
            for data in samples(file, 0, size):
                digest.update(data)
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
        return digest.hexdigest()

    @contextmanager
    def _opened(self) -> "Iterator[dict[str, Tensor]]":
        yield load_tensors(self.path)


def load_tensors(path: Path) -> "dict[str, Tensor]":
    """Return the tensors of a file by their names, memory-mapped as long as one of them lives. Raises WeightsError for
    other objects, and for a damaged file."""
    import torch

    try:
        _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds pickled Python objects, not only tensors: to open it would run code from it.", hint=_INSTEAD
        ) from error
    except Exception as error:  # `torch.load` raises whatever its parsers do
        shown = str(getattr(error, "strerror", None) or error).strip()
        reason = (shown.splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{path} is damaged, or in PyTorch's format of before 1.6: {cut(reason)}.", hint=fetch_again(path)
        ) from error
    parts = _parts(state)
    if not parts:
        raise WeightsError(f"{path} is no dictionary of tensors: it holds {_others(state)}.", hint=_INSTEAD)
    named = [
        (_WRAPPERS.sub("", name if len(parts) == 1 else f"{root}.{name}"), tensor)
        for root, part in parts.items()
        for name, tensor in part.items()
    ]
    if len(found := dict(named)) < len(named):
        raise WeightsError(f"{path} has several tensors of one name.", hint=_INSTEAD)
    return found


def _parts(state: object) -> "dict[str, dict[str, Tensor]]":
    """Return the dictionaries of tensors in an object, by name: itself, or those in it. Other objects beside them belong
    to the training. Empty if there are none."""
    import torch

    if _others(state) is None:
        return {"": cast("dict[str, Tensor]", state)}
    if not isinstance(state, dict) or any(isinstance(value, torch.Tensor) for value in state.values()):
        return {}
    return {name: part for name, part in state.items() if isinstance(name, str) and _others(part) is None}


def _check_archive(path: Path) -> None:
    """Raise ValueError for an archive with packed files, of which PyTorch writes none, or with too many objects: a
    stranger's may take hours and all memory to unpack. Raises OSError and BadZipFile too."""
    with open_regular(path) as file, ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.compress_type != ZIP_STORED:
                raise ValueError(f"{cut(entry.filename)} in it is packed")
            if entry.filename.endswith(".pkl") and entry.file_size > _MOST_BYTES:
                raise ValueError(f"{cut(entry.filename)} in it has {entry.file_size} bytes")


def _others(state: object) -> str | None:
    """Describe what a file holds if it is no flat dictionary of plain tensors; None if it is."""
    import torch

    if not isinstance(state, dict) or not state:
        return f"a {type(state).__name__}"
    for key, value in state.items():
        if not isinstance(key, str) or type(value) not in (torch.Tensor, torch.nn.Parameter):
            return f"{cut(repr(key), 80)}: a {type(value).__name__}"
        if value.layout is not torch.strided or value.device.type != "cpu":
            return f"{cut(repr(key), 80)}: a tensor that is sparse or without values"
        if str(value.dtype) not in DTYPES:
            return f"{cut(repr(key), 80)}: {value.dtype}"
        if value.nbytes > value.untyped_storage().nbytes():
            return f"{cut(repr(key), 80)}: a tensor that repeats its values"
    return None
