"""Triton forms of `wanduet.kernels.dit.quantized`, and the products in 8 bits that a GPU may have.

Imported lazily, only if Triton is installed. Products: ours, of int8 or fp8 operands, in one of `TILES`; PyTorch's of fp8
by rows (`torch._scaled_mm`), whose sums are exact on Hopper, as its fast ones round to 14 bits; PyTorch's of int8
(`torch._int_mm`), whose int32 result a kernel of ours scales. `choose_product` says which is fastest.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton reads the annotations of a kernel's parameters itself.)

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanduet.kernels.device import on_device_of
from wanduet.kernels.dit.gpu import LEAST_MAXIMUM, launch_residual_norm, launch_shape, to_8_bits
from wanduet.kernels.dit.plain import Norm
from wanduet.kernels.dit.quantized import INT_MM_TOKENS, LARGEST, QuantizedKernels, QuantizedRows

Product: TypeAlias = Callable[[QuantizedRows, QuantizedRows, Tensor, Tensor], None]

# cuBLAS has products in fp8 only for multiples of so many rows. It refuses some of these, too, but only when it is asked: on an
# H200, one of 1064 rows whose scales did not begin at a multiple of so many bytes.
CUBLAS_ROWS, CUBLAS_BYTES = 8, 16
_LACKING: set[tuple[int, int, int]] = set()  # rows, channels in and out, of products that cuBLAS has refused
GROUP = 8  # tiles of rows that are computed together, so that their weights are read from the cache


@dataclass(frozen=True, slots=True)
class Tile:
    """A program's tile of a product: rows, columns, channels a turn, warps, and turns whose operands are loaded ahead."""

    rows: int
    columns: int
    channels: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """Of the product, in measurements."""
        return f"triton {self.rows}x{self.columns}x{self.channels}, {self.warps} warps, {self.stages} stages"


TILES = (Tile(128, 128, 128, 8, 3), Tile(128, 128, 64, 8, 4), Tile(64, 128, 128, 4, 4))


@triton.jit
def _gelu(x):
    """Compute tanh-GELU, as `x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x^3))`."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit(do_not_specialize=["length"])  # type: ignore[untyped-decorator]
def _quantize_kernel(
    x_ptr, out_ptr, scale_ptr, x_batch, x_row, out_batch, out_row, scale_batch, scale_row, length,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, GELU: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Quantize rows of x, or with `GELU` of its GELU, `BLOCK` columns at a time; rows are read again from the cache.

    GELU grows with x where it is positive, and is nowhere below -0.17005: unless the largest is as small as that, it is that
    of the largest x, and need not be computed twice for all x.
    """
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_i64 = row.to(tl.int64)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    in_length = row[:, None] < length
    x_at = x_ptr + batch * x_batch + row_i64 * x_row + col
    size = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, C, BLOCK):
        x = tl.load(x_at + start, in_length & (start + col < C), 0.0).to(tl.float32)
        size = tl.maximum(size, x if GELU else tl.abs(x))
    largest = tl.max(size, 1)[:, None]
    if GELU:
        largest = _gelu(largest)
        if tl.min(largest) < 0.1701:
            size = tl.zeros((ROWS, BLOCK), tl.float32)
            for start in range(0, C, BLOCK):
                x = tl.load(x_at + start, in_length & (start + col < C), 0.0).to(tl.float32)
                size = tl.maximum(size, tl.abs(_gelu(x)))
            largest = tl.max(size, 1)[:, None]
    largest = tl.maximum(largest, LEAST_MAXIMUM)
    out_at = out_ptr + batch * out_batch + row_i64 * out_row + col
    for start in range(0, C, BLOCK):
        mask = in_length & (start + col < C)
        x = tl.load(x_at + start, mask, 0.0).to(tl.float32)
        if GELU:
            x = _gelu(x)
        tl.store(out_at + start, to_8_bits(x * (LARGEST / largest), out_ptr.dtype.element_ty), mask)
    tl.store(scale_ptr + batch * scale_batch + row_i64 * scale_row, largest * (1.0 / LARGEST), in_length)


# Nor are scales: a chunk's may begin anywhere.
@triton.jit(do_not_specialize=["length", "x_scale_ptr"])  # type: ignore[untyped-decorator]
def _linear_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, x_scale_ptr, weight_scale_ptr, out_row, length, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Compute a tile of `x @ weight.T * scales + bias`; x `[length, K]` and weight `[N, K]` are contiguous.

    Sums are int32, or float32 to which Hopper's products of 32 channels are added. `WHOLE`: K is a multiple of `BLOCK_K`.
    """
    program = tl.program_id(0)
    columns = (N + BLOCK_N - 1) // BLOCK_N
    first = program // (GROUP * columns) * GROUP
    height = tl.minimum((length + BLOCK_M - 1) // BLOCK_M - first, GROUP)
    inside = program % (GROUP * columns)
    row = (first + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = inside // height * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows beyond the end are read from the beginning, and not written.
    x_at = x_ptr + (row % length).to(tl.int64)[:, None] * K + k[None, :]
    weight_at = weight_ptr + (col % N)[None, :] * K + k[:, None]
    is_int: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if is_int else tl.float32)
    for start in range(0, K, BLOCK_K):
        if WHOLE:
            x = tl.load(x_at)
            weight = tl.load(weight_at)
        else:
            x = tl.load(x_at, start + k[None, :] < K, 0.0)
            weight = tl.load(weight_at, start + k[:, None] < K, 0.0)
        if is_int:
            sums = tl.dot(x, weight, sums, out_dtype=tl.int32)
        else:
            sums = tl.dot(x, weight, sums, max_num_imprecise_acc=32)
        x_at += BLOCK_K
        weight_at += BLOCK_K
    x_scale = tl.load(x_scale_ptr + row, row < length, 0.0)
    weight_scale = tl.load(weight_scale_ptr + col, col < N, 0.0)
    bias = tl.load(bias_ptr + col, col < N, 0.0).to(tl.float32)
    out = sums.to(tl.float32) * x_scale[:, None] * weight_scale[None, :] + bias[None, :]
    out_at = out_ptr + row.to(tl.int64)[:, None] * out_row + col[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), (row[:, None] < length) & (col[None, :] < N))


@triton.jit  # type: ignore[untyped-decorator]
def _scale_kernel(
    sums_ptr, bias_ptr, out_ptr, x_scale_ptr, weight_scale_ptr, out_row, N, BLOCK: tl.constexpr
):  # fmt: skip
    """Compute `sums * scales + bias` of a row's `BLOCK` columns; sums int32 `[L, N]`, contiguous."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < N
    sums = tl.load(sums_ptr + row * N + col, mask, 0).to(tl.float32)
    scaled = sums * tl.load(x_scale_ptr + row) * tl.load(weight_scale_ptr + col, mask, 0.0)
    out = scaled + tl.load(bias_ptr + col, mask, 0.0).to(tl.float32)
    tl.store(out_ptr + row * out_row + col, out.to(out_ptr.dtype.element_ty), mask)


def quantize(x: Tensor, out: QuantizedRows) -> None:
    """See `quantized.quantize`."""
    _launch_quantize(x, out, gelu=False)


def quantize_norm(x: Tensor, y: Tensor | None, gate: Tensor | None, norm: Norm, out: QuantizedRows) -> None:
    """See `quantized.quantize_norm`."""
    launch_residual_norm(x, y, gate, norm, out.data, out.scale)


def quantize_gelu(x: Tensor, out: QuantizedRows) -> None:
    """See `quantized.quantize_gelu`."""
    _launch_quantize(x, out, gelu=True)


def multiply_in(tile: Tile, x: QuantizedRows, weight: QuantizedRows, bias: Tensor, out: Tensor) -> None:
    """See `quantized.quantized_linear`."""
    columns, channels = weight.shape
    for data, scale, result in zip(x.data, x.scale, out, strict=True):
        _require_contiguous(data, scale, weight.data, weight.scale)
        length = len(data)
        grid = (triton.cdiv(length, tile.rows) * triton.cdiv(columns, tile.columns),)
        with on_device_of(out):
            _linear_kernel[grid](
                data, weight.data, bias, result, scale, weight.scale, result.stride(0), length, columns, channels,
                BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.channels, GROUP=GROUP,
                WHOLE=channels % tile.channels == 0, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
            )  # fmt: skip


def multiply_by_scaled_mm(
    x: QuantizedRows, weight: QuantizedRows, bias: Tensor, out: Tensor, fast: bool = False
) -> None:
    """See `quantized.quantized_linear`; fp8 only. `fast`: sums of fewer bits. Rows that cuBLAS has no product for are
    multiplied by our own kernel."""
    whole = x.shape[1] // CUBLAS_ROWS * CUBLAS_ROWS
    if not _multiply_by_cublas(x.tokens(slice(whole)), weight, bias, out[:, :whole], fast):
        whole = 0
    if whole < x.shape[1]:
        rest = slice(whole, None)
        multiply_in(TILES[0], x.tokens(rest), weight, bias, out[:, rest])


def _multiply_by_cublas(x: QuantizedRows, weight: QuantizedRows, bias: Tensor, out: Tensor, fast: bool) -> bool:
    """Return whether cuBLAS has a product of these shapes; if not, `out` is as it was."""
    shape = (x.shape[1], *weight.shape)
    if not shape[0] or shape in _LACKING:
        return False
    for data, scale, result in zip(x.data, x.scale, out, strict=True):
        if scale.data_ptr() % CUBLAS_BYTES:
            scale = scale.clone()
        try:
            got = torch._scaled_mm(
                data, weight.data.t(), scale, weight.scale.t(), bias, out_dtype=out.dtype, use_fast_accum=fast,
                out=result if result.is_contiguous() else None,
            )  # fmt: skip
        except RuntimeError as problem:
            if "CUBLAS_STATUS_NOT_SUPPORTED" not in str(problem):
                raise
            _LACKING.add(shape)
            return False
        if not result.is_contiguous():
            result.copy_(got)
    return True


def multiply_by_int_mm(x: QuantizedRows, weight: QuantizedRows, bias: Tensor, out: Tensor) -> None:
    """See `quantized.quantized_linear`; int8 only."""
    columns, block = len(weight.data), 1024
    for data, scale, result in zip(x.data, x.scale, out, strict=True):
        for start in range(0, len(data), INT_MM_TOKENS):
            rows = slice(start, start + INT_MM_TOKENS)
            sums = torch._int_mm(data[rows], weight.data.t())
            with on_device_of(out):
                _scale_kernel[(len(sums), triton.cdiv(columns, block))](
                    sums, bias, result[rows], scale[rows], weight.scale, result.stride(0), columns, BLOCK=block,
                    enable_fp_fusion=True,
                )  # fmt: skip


def products(dtype: torch.dtype) -> dict[str, Product]:
    """Return the products of operands in an 8-bit `dtype` that a GPU may have."""
    ours: dict[str, Product] = {tile.name: partial(multiply_in, tile) for tile in TILES}
    if dtype == torch.int8:
        return ours | {"torch._int_mm": multiply_by_int_mm}
    return {"torch._scaled_mm": multiply_by_scaled_mm} | ours


def _launch_quantize(x: Tensor, out: QuantizedRows, *, gelu: bool) -> None:
    batch, length, width = x.shape
    if x.stride(-1) != 1:
        raise ValueError("Fused kernels need channels that lie side by side in memory.")
    # Of wide rows, so many columns at a time took the least time on an H200: no lanes are idle.
    block, rows, warps = launch_shape(width) if width <= 2048 else (1024, 1, 8)
    with on_device_of(x):
        _quantize_kernel[(triton.cdiv(length, rows), batch)](
            x, out.data, out.scale, x.stride(0), x.stride(1), out.data.stride(0), out.data.stride(1),
            out.scale.stride(0), out.scale.stride(1), length,
            C=width, BLOCK=block, ROWS=rows, GELU=gelu, LARGEST=LARGEST[out.data.dtype], num_warps=warps,
            enable_fp_fusion=True,
        )  # fmt: skip


def _require_contiguous(*tensors: Tensor) -> None:
    if not all(x.is_contiguous() for x in tensors):
        raise ValueError("Products in 8 bits need contiguous operands.")


TRITON_QUANTIZED = QuantizedKernels("triton", quantize, quantize_norm, quantize_gelu, partial(multiply_in, TILES[0]))
