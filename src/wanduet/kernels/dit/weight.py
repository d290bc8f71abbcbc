"""Matrices of linear layers in the format in which they are in memory, which may be smaller than what products take.

The one place that knows formats: a kernel asks a `Weight` for its dense matrix and multiplies by that. A format changes
memory only; products are computed in the dtype of their input. `q8` and `fp8` have one float32 scale for each output row,
and values in int8, symmetric around 0, or in float8_e4m3fn. On normally distributed weights the error of `q8` is 0.8 % of
the weights' norm, that of `fp8` 2.6 %, in equally many bytes; on the matrices of the bundled miniature the same. `fp8` is
for weights that were float8_e4m3fn, without scales or with one for a matrix or row: it keeps their numbers, and so adds no
error, where `q8` adds 0.8 %.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from wanduet.kernels.views import side_by_side

# Elements that are converted at a time: each float32 temporary is at most 16 MiB.
CHUNK_ELEMENTS = 4 * 2**20
# In magnitude. -128 is not used, so that the range is symmetric.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# The largest float8_e4m3fn of every mantissa; the largest of all is last, so that it is preferred.
LARGEST_BY_MANTISSA = (240.0, 256.0, 288.0, 320.0, 352.0, 384.0, 416.0, 448.0)
SAMPLED = 128  # columns of which it is tried whether they are float8 already


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """A format of matrices: the dtype of their elements, and whether each row has a float32 scale."""

    name: str
    dtype: torch.dtype
    scaled: bool = False

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a matrix `[O, I]`, with its scales."""
        return prod(shape) * self.dtype.itemsize + (shape[0] * 4 if self.scaled else 0)


FORMATS = {
    one.name: one
    for one in (
        WeightFormat("bf16", torch.bfloat16),
        WeightFormat("q8", torch.int8, True),
        WeightFormat("fp8", torch.float8_e4m3fn, True),
    )
}


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
            data = self.data[rows]
            if data.is_floating_point():  # PyTorch multiplies no float8; every value is exact in 16 bits
                data = out[rows].copy_(data)
            torch.mul(data, self.scale[rows], out=out[rows])
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
            scale = _scales(exact, self.data.dtype)
            self.scale[rows] = scale
            values = exact / scale  # not in place: `exact` may be the source
            self.data[rows] = values.round_() if self.data.dtype == torch.int8 else values


def _scales(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a scale for each row `[O, 1]` of a float32 matrix, so that its largest number is the largest of the format.

    For float8, it is a larger one if the row's numbers are float8 times a scale already, which this scale keeps.
    """
    largest = exact.abs().amax(1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny
    # Multiplied, not divided: CUDA divides by a number less exactly.
    found = (largest * (1 / LARGEST[dtype])).clamp_min_(tiny)
    if dtype == torch.float8_e4m3fn:
        some = exact[:, :: max(1, exact.shape[1] // SAMPLED)]
        for most in LARGEST_BY_MANTISSA:
            tried = (largest * (1 / most)).clamp_min_(tiny)
            values = some / tried
            size = values.abs()
            # Below the smallest normal number, float8 has the same steps whatever the scale.
            kept = ((values.to(dtype).float() - values).abs() <= size * 2**-20) | (size < 2**-6)
            found = torch.where(kept.all(1, keepdim=True), tried, found)
    return found


def _chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    rows = max(1, CHUNK_ELEMENTS // shape[1])
    return (slice(start, start + rows) for start in range(0, shape[0], rows))
