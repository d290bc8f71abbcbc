"""Matrices of linear layers in the format in which they are in memory, which may be smaller than what products take.

The one place that knows formats: a kernel asks a `Weight` for its dense matrix and multiplies by that. A format changes
memory only; products are computed in the dtype of their input. `q8` has one float32 scale for each output row and int8
values, symmetric around 0. On normally distributed weights its error is 0.8 % of the weights' norm, that of float8_e4m3
with the same scales 2.6 %, in equally many bytes; on the matrices of the bundled miniature 0.8 % and 2.6 % too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from wanduet.kernels.views import side_by_side

# Elements that are converted at a time: each float32 temporary is at most 16 MiB.
CHUNK_ELEMENTS = 4 * 2**20
LARGEST = 127  # of int8, in magnitude: -128 is not used, so that the range is symmetric


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """A format of matrices: the dtype of their elements, and whether each row has a float32 scale."""

    name: str
    dtype: torch.dtype
    scaled: bool = False

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a matrix `[O, I]`, with its scales."""
        return prod(shape) * self.dtype.itemsize + (shape[0] * 4 if self.scaled else 0)


FORMATS = {one.name: one for one in (WeightFormat("bf16", torch.bfloat16), WeightFormat("q8", torch.int8, True))}


def format_of(name: str, dtype: torch.dtype) -> WeightFormat | None:
    """Return the format that `EngineConfig.weights` names, in a model that computes in `dtype`.

    None if matrices are in memory as products take them: for "auto", and for a format that is no smaller than `dtype`.
    """
    named = FORMATS.get(name)
    return None if named is None or named.dtype.itemsize >= dtype.itemsize else named


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix `[O, I]`: `data`, and for a format with scales `scale` `[O, 1]` float32; the matrix is their product."""

    data: Tensor
    scale: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Output and input features."""
        return self.data.shape

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    @staticmethod
    def adjacent(*weights: "Weight") -> "Weight | None":
        """Return a view of the matrices concatenated over their rows; None if they are not adjacent in memory."""
        data = side_by_side(*(weight.data for weight in weights))
        if data is None or weights[0].scale is None:
            return None if data is None else Weight(data)
        scale = side_by_side(*(weight.scale for weight in weights if weight.scale is not None))
        return None if scale is None else Weight(data, scale)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix in `dtype`, rounded once from float32; the data itself if they are in that dtype."""
        if self.data.dtype == dtype:
            return self.data
        if self.scale is None:
            return self.data.to(dtype)
        out = torch.empty_like(self.data, dtype=dtype)
        # On a GPU the product has no temporary; on a CPU PyTorch converts the operands and the result as a whole.
        for rows in _chunks(self.shape) if out.device.type == "cpu" else (slice(None),):
            torch.mul(self.data[rows], self.scale[rows], out=out[rows])
        return out

    @torch.no_grad()
    def copy_(self, source: Tensor) -> None:
        """Write a matrix of this shape, in any floating dtype and on any device, in this weight's format.

        Values are the same on every device: each operation is rounded exactly. A row with NaN or infinity becomes NaN.
        """
        if self.scale is None:
            self.data.copy_(source)
            return
        for rows in _chunks(self.shape):
            exact = source[rows].to(self.data.device, torch.float32)
            # Multiplied, not divided: CUDA divides by a number less exactly.
            scale = (exact.abs().amax(1, keepdim=True) * (1 / LARGEST)).clamp_min_(torch.finfo(torch.float32).tiny)
            self.scale[rows] = scale
            self.data[rows] = (exact / scale).round_()  # not in place: `exact` may be the source


def _chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    rows = max(1, CHUNK_ELEMENTS // shape[1])
    return (slice(start, start + rows) for start in range(0, shape[0], rows))
