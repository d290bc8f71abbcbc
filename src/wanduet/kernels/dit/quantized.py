"""8-bit matrix products: operands whose rows have 8-bit values and a scale each, and the plain form of each operation.

`QuantizedKernels` is the set of operations around such products; `TORCH_QUANTIZED` has the plain PyTorch form of each, the
reference for every faster one: operands are rounded to 8 bits in the same way, and multiplied exactly. A row is quantized
where it is written, because its scale needs the whole row. No operation has gradients.

Shapes: tokens `[B, L, C]`; `QuantizedRows` `[B, L, C]` with scales `[B, L, 1]`, or of a weight `[O, I]` with `[O, 1]`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from wanduet.kernels.dit import plain
from wanduet.kernels.dit.plain import CHUNK_TOKENS, Norm

EightBits: TypeAlias = Literal["fp8", "int8"]
Quantize: TypeAlias = Literal["off", "fp8", "int8"]  # as in a request
# By name: the dtype, and its largest value, to which the largest of each row is mapped.
DTYPES: dict[EightBits, torch.dtype] = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}  # -128 is not used, so that the range is symmetric
INT_MM_TOKENS = 1024  # at a time in torch._int_mm, for its result in int32
SMALLEST = 1e-20  # the largest value of a row of zeros, so that its scale can be inverted


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """A matrix or batch of matrices `[..., C]`: `data` in 8 bits, and `scale` `[..., 1]` float32; their product."""

    data: Tensor
    scale: Tensor

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> "QuantizedRows":
        """Return uninitialised memory for `shape`."""
        data = torch.empty(shape, dtype=dtype, device=device)
        return cls(data, torch.empty(*shape[:-1], 1, dtype=torch.float32, device=device))

    @property
    def shape(self) -> torch.Size:
        """Of the values."""
        return self.data.shape

    def tokens(self, rows: slice) -> "QuantizedRows":
        """Return a view of some of the tokens of `[B, L, C]`."""
        return QuantizedRows(self.data[:, rows], self.scale[:, rows])

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the values in `dtype`, rounded once from float32."""
        return (self.data.float() * self.scale).to(dtype)


@dataclass(frozen=True, slots=True)
class QuantizedKernels:
    """One implementation of each operation. The functions below document what each computes; all write into `out`."""

    name: str
    quantize: Callable[[Tensor, QuantizedRows], None]
    quantize_norm: Callable[[Tensor, Tensor | None, Tensor | None, Norm, QuantizedRows], None]
    quantize_gelu: Callable[[Tensor, QuantizedRows], None]
    quantized_linear: Callable[[QuantizedRows, QuantizedRows, Tensor, Tensor], None]


def quantize(x: Tensor, out: QuantizedRows) -> None:
    """Write the rows of `[B, L, C]`, in any dtype, rounded to the nearest 8-bit values."""
    for rows in _chunks(x.shape[1]):
        _write(x[:, rows].float(), out.tokens(rows))


def quantize_norm(x: Tensor, y: Tensor | None, gate: Tensor | None, norm: Norm, out: QuantizedRows) -> None:
    """Add `gate * y` to x in place, if there is y, and write the sum's `norm` (see `plain.residual_norm`)."""
    for rows in _chunks(x.shape[1]):
        x_rows = x[:, rows]
        if y is None:
            normed = plain.norm(x_rows, norm, torch.float32)
        else:
            normed = x.new_empty(x_rows.shape)
            plain.residual_norm(x_rows, y[:, rows], gate, norm, normed)
        _write(normed, out.tokens(rows))


def quantize_gelu(x: Tensor, out: QuantizedRows) -> None:
    """Write `gelu_tanh(x)` of `[B, L, F]`."""
    for rows in _chunks(x.shape[1]):
        _write(F.gelu(x[:, rows].float(), approximate="tanh"), out.tokens(rows))


def quantized_linear(x: QuantizedRows, weight: QuantizedRows, bias: Tensor, out: Tensor) -> None:
    """Write `x @ weight.T + bias` `[B, L, O]`, computed in `out`'s dtype; bias `[O]` in that dtype."""
    matrix = weight.dense(out.dtype)
    for rows in _chunks(x.shape[1]):
        out[:, rows] = F.linear(x.tokens(rows).dense(out.dtype), matrix, bias)


def _write(x: Tensor, out: QuantizedRows) -> None:
    largest = x.abs().amax(-1, keepdim=True).clamp_min_(SMALLEST)
    most = LARGEST[out.data.dtype]
    scaled = x * (most / largest)
    out.data.copy_(scaled.round_() if out.data.dtype == torch.int8 else scaled)
    out.scale.copy_(largest * (1 / most))


def _chunks(length: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK_TOKENS, length)) for start in range(0, length, CHUNK_TOKENS))


TORCH_QUANTIZED = QuantizedKernels("torch", quantize, quantize_norm, quantize_gelu, quantized_linear)
