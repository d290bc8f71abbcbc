"""Interface between model loaders and sources of weights (safetensors files, modules, other formats)."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from wanduet.errors import WeightsError
from wanduet.untrusted import cut

if TYPE_CHECKING:  # configs and headers are read and checked before torch is imported
    import torch
    from torch import Tensor

FETCH_MODEL = "Fetch the model again with `wanduet download`."


def fetch_again(path: Path) -> str:
    """Return what to do about a damaged file or folder of weights: `wanduet download` fetches those of whole models only."""
    in_cache = any(folder.name.startswith("models--") for folder in path.parents)
    if in_cache or any((folder / "model_index.json").is_file() for folder in (path, *path.parents[:2])):
        return FETCH_MODEL
    return f"Fetch {path.name} again, and compare its size with that on the page it came from."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's entry in a file header. `dtype`: safetensors' name (`F32`, `BF16`). `num_bytes`: its bytes in the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int = 0


class Target(Protocol):
    """What a weight is loaded into: an allocated tensor, or a matrix that is converted to its format."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        ...

    def copy_(self, source: "Tensor", /) -> object:
        """Write a weight of this shape, of any floating dtype."""
        ...


class WeightSource(ABC):
    """The tensors of one component (transformer, VAE, text encoder), by the names of a Diffusers checkpoint.

    `tensors` describes all tensors by name, without reading their data. `metadata`: the text that the files have beside
    their tensors. `quantisation`: how the matrices are stored if they are smaller than what `iterate` yields.
    """

    def __init__(self, name: str) -> None:
        """`name`: the component's name in messages."""
        self.name = name
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self.quantisation: str | None = None

    @abstractmethod
    def iterate(self, names: Collection[str]) -> "Iterator[tuple[str, Tensor]]":
        """Yield `(name, tensor)` in the order that is fastest to read; a tensor is valid until the next one.

        Names that the source does not have are skipped. Raises WeightsError.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a digest that identifies the weights: different weights have different digests. Reads a few MiB."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        return {name: info.shape for name, info in self.tensors.items()}

    def read(self, names: Collection[str], dtype: "torch.dtype") -> "dict[str, Tensor]":
        """Return copies of the named tensors in `dtype`; no file stays mapped.

        Raises WeightsError for a missing one.
        """
        self.require(names)
        return {name: tensor.to(dtype, copy=True) for name, tensor in self.iterate(names)}

    def read_rows(self, name: str, rows: Sequence[int], dtype: "torch.dtype") -> "Tensor":
        """Return the given rows of a tensor in `dtype`; a source that can do so does not read the others. Raises
        WeightsError."""
        import torch

        self.require_rows(name, rows)
        # A mapped tensor is read only where it is indexed. Not safetensors' `get_slice`, which leaks some bytes for each
        # slice (safetensors 0.8).
        _, tensor = next(iter(self.iterate([name])))
        return tensor[torch.tensor(rows, dtype=torch.long)].to(dtype)

    def require_rows(self, name: str, rows: Sequence[int]) -> None:
        """Raise WeightsError if a tensor is missing or has fewer rows than these."""
        self.require([name])
        count = self.tensors[name].shape[0] if self.tensors[name].shape else 0
        if not all(0 <= row < count for row in rows):  # a negative row would count from the end
            raise WeightsError(
                f"The {self.name}'s {name} has {count} rows, but row {max(rows)} is asked for: "
                "tokenizer and weights do not belong together."
            )

    def load_into(self, targets: Mapping[str, Target], ignore: Collection[str] = ()) -> None:
        """Copy the weights into allocated tensors, one by one, converted to the format and device of each target.

        Raises WeightsError if `check` fails.
        """
        import torch

        self.check({name: tuple(target.shape) for name, target in targets.items()}, ignore)
        with torch.no_grad():
            for name, tensor in self.iterate(targets):
                targets[name].copy_(tensor)

    def check(self, shapes: "Mapping[str, tuple[int, ...]]", ignore: Collection[str] = ()) -> None:
        """Compare the tensors' names and shapes with those that a model needs; reads no data.

        Names must match exactly, except those in `ignore`. Raises WeightsError, which names the tensors that are
        missing, unexpected, of another shape, or of an integer dtype (a quantised checkpoint's integers are useless
        without scales).
        """
        missing = sorted(set(shapes) - set(self.tensors))
        surplus = sorted(set(self.tensors) - set(shapes) - set(ignore))
        wrong = [n for n, shape in shapes.items() if n in self.tensors and shape != self.tensors[n].shape]
        whole = sorted(n for n in shapes if n in self.tensors and self.tensors[n].dtype.startswith(("I", "U", "BOOL")))
        problems = [
            f"{label}: {some_of(names)}"
            for label, names in (
                ("missing", missing),
                ("not known", surplus),
                ("of another shape", wrong),
                ("whole numbers", whole),
            )
            if names
        ]
        if problems:
            files = {info.file for info in self.tensors.values()}
            alone = next(iter(files)) if len(files) == 1 else None
            if alone is None or not alone.name or (alone.parent / "config.json").is_file():  # no name: of a module
                raise WeightsError(f"The {self.name}'s tensors do not match its config.json; {'; '.join(problems)}.")
            raise WeightsError(
                f"{alone} is no whole {self.name} of Wan2.1; {'; '.join(problems)}.",
                hint="Take another file of the same weights. What a file is: wanduet inspect FILE",
            )

    def require(self, names: Collection[str]) -> None:
        """Raise WeightsError if any of these tensors are missing."""
        missing = sorted(set(names) - set(self.tensors))
        if missing:
            file = next((info.file for info in self.tensors.values()), None)
            raise WeightsError(
                f"The {self.name}'s files lack {some_of(missing)}.",
                hint=FETCH_MODEL if file is None else fetch_again(file),
            )


def some_of(names: Sequence[str], most: int = 5) -> str:
    """Return the first `most` names of a list as text, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(cut(name) for name in names[:most]) + more
