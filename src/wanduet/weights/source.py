"""Where a component's weights come from: what a loader asks of files, of modules, and of any other form of weights."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wanduet.errors import WeightsError
from wanduet.untrusted import cut

if TYPE_CHECKING:  # configs and headers are read, and refused, before torch is imported
    import torch
    from torch import Tensor

HINT = "Fetch the model again with `wanduet download`."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of a tensor; `dtype` as safetensors names it (`F32`, `BF16`)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int = 0


class WeightSource(ABC):
    """The tensors of one component (transformer, VAE, text encoder), by the names of a Diffusers checkpoint.

    `tensors` says what there is without reading it.
    """

    def __init__(self, name: str) -> None:
        """`name` is the component's, for messages."""
        self.name = name
        self.tensors: dict[str, TensorInfo] = {}

    @abstractmethod
    def iterate(self, names: Collection[str]) -> "Iterator[tuple[str, Tensor]]":
        """Yield the named tensors in the order that is fastest to read; each is valid until the next. Names that are not
        there are left out. Raises WeightsError."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Identify the weights: another digest for other weights, read from a few MiB at most."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name."""
        return {name: info.shape for name, info in self.tensors.items()}

    def read(self, names: Collection[str], dtype: "torch.dtype") -> "dict[str, Tensor]":
        """Copies of the named tensors in `dtype`; nothing stays mapped. Raises WeightsError for a missing one."""
        self.require(names)
        return {name: tensor.to(dtype, copy=True) for name, tensor in self.iterate(names)}

    def load_into(self, targets: "Mapping[str, Tensor]", ignore: Collection[str] = ()) -> None:
        """Fill tensors that have their memory already, one by one; dtype and device are the targets'.

        Raises WeightsError if `check` does.
        """
        import torch

        self.check({name: tuple(target.shape) for name, target in targets.items()}, ignore)
        with torch.no_grad():
            for name, tensor in self.iterate(targets):
                targets[name].copy_(tensor)

    def check(self, shapes: "Mapping[str, tuple[int, ...]]", ignore: Collection[str] = ()) -> None:
        """Compare with the shapes that a model needs, from the headers alone.

        Names must match exactly, but for those in `ignore`. Raises WeightsError that names what is missing,
        surplus, of another shape, or whole numbers: a quantised checkpoint's, which mean nothing by themselves.
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
            raise WeightsError(f"The {self.name}'s tensors do not match its config.json; {'; '.join(problems)}.")

    def require(self, names: Collection[str]) -> None:
        """Raise WeightsError where some of these tensors are missing."""
        missing = sorted(set(names) - set(self.tensors))
        if missing:
            raise WeightsError(f"The {self.name}'s files lack {some_of(missing)}.", hint=HINT)


def some_of(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(cut(name) for name in names[:most]) + more
