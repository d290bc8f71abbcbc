"""Triton forms of `wanduet.kernels.dit.plain`, which read and write every tensor once.

Imported lazily, only if Triton is installed (`wanduet.kernels.select.kernels_for`). A program computes in float32 and
has whole rows of channels in registers. With gradients enabled, the plain forms run instead.

Bytes moved by the operations between the matrix products of each block, in units of one `[L, C]` tensor in bf16
(480p: 32,760 x 1536 x 2 B = 0.1006 GB):

    operation                         reads            writes        units
    q, k norm + rotation              q, k             q, k              4
    residual + norm after self-attn   x (2), y         x (2), n          6
    cross-attention, norm included    q                out               2
    residual + norm after cross-attn  x (2), y         x (2), n          6
    GELU                              in the product's epilogue          0
    residual + norm after the FFN     x (2), y         x (2), n          6

24 units, 2.42 GB a block at 480p; 30 blocks and the first norm: 73 GB a forward.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton reads the annotations of a kernel's parameters itself.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanduet.kernels.attention.cross import text_attention
from wanduet.kernels.device import on_device_of
from wanduet.kernels.dit import plain
from wanduet.kernels.dit.plain import Kernels, Norm, QKNorm
from wanduet.kernels.dit.quantized import LARGEST, SMALLEST
from wanduet.kernels.dit.weight import Weight

LEAST_MAXIMUM = tl.constexpr(SMALLEST)  # of a row in 8 bits


@triton.jit  # type: ignore[untyped-decorator]
def to_8_bits(x, dtype: tl.constexpr):
    """Round to `dtype`, int8 or fp8. Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, as `torch.round` does."""
    if dtype == tl.int8:
        x = (x + 12582912.0) - 12582912.0
    return x.to(dtype)


# Lengths are not specialised, here and below, so that another video or prompt does not compile a kernel again.
@triton.jit(do_not_specialize=["length"])  # type: ignore[untyped-decorator]
def _residual_norm_kernel(
    x_ptr, y_ptr, out_ptr, gate_ptr, weight_ptr, bias_ptr, scale_ptr,
    x_batch, x_row, y_batch, y_row, out_batch, out_row, gate_batch, weight_batch, bias_batch, scale_batch, scale_row,
    length, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_Y: tl.constexpr, HAS_GATE: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    """Compute `x += gate * y` and `out = LayerNorm(x) * weight + bias`, with `LARGEST` in 8 bits and with scales.

    `out` may be `y`: rows are read before written.
    """
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_i64 = row.to(tl.int64)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    in_width = col < C
    mask = (row[:, None] < length) & in_width
    weight = tl.load(weight_ptr + batch * weight_batch + col, in_width, 0.0)
    bias = tl.load(bias_ptr + batch * bias_batch + col, in_width, 0.0)
    x_at = x_ptr + batch * x_batch + row_i64 * x_row + col
    x = tl.load(x_at, mask, 0.0).to(tl.float32)
    if HAS_Y:
        y = tl.load(y_ptr + batch * y_batch + row_i64 * y_row + col, mask, 0.0).to(tl.float32)
        if HAS_GATE:
            y = y * tl.load(gate_ptr + batch * gate_batch + col, in_width, 0.0)
        x = x + y
        tl.store(x_at, x.to(x_ptr.dtype.element_ty), mask)
    mean = tl.sum(x, 1)[:, None] / C
    centred = tl.where(mask, x - mean, 0.0)
    variance = tl.sum(centred * centred, 1)[:, None] / C
    normed = centred * tl.rsqrt(variance + eps) * weight + bias
    out_at = out_ptr + batch * out_batch + row_i64 * out_row + col
    if LARGEST > 0.0:
        normed = tl.where(mask, normed, 0.0)
        largest = tl.maximum(tl.max(tl.abs(normed), 1)[:, None], LEAST_MAXIMUM)
        tl.store(out_at, to_8_bits(normed * (LARGEST / largest), out_ptr.dtype.element_ty), mask)
        scale_at = scale_ptr + batch * scale_batch + row_i64 * scale_row
        tl.store(scale_at, largest * (1.0 / LARGEST), row[:, None] < length)
    else:
        tl.store(out_at, normed.to(out_ptr.dtype.element_ty), mask)


@triton.jit  # type: ignore[untyped-decorator]
def _rms_norm_rotate(
    at, weight_at, mask, in_width, cos, sin, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Apply RMSNorm to the rows at `at`, then rotate interleaved pairs, in place."""
    x = tl.load(at, mask, 0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 1)[:, None] / C + eps) * tl.load(weight_at, in_width, 0.0).to(tl.float32)
    if ROTATE:
        first, second = tl.split(tl.reshape(x, (ROWS, BLOCK // 2, 2)))
        x = tl.reshape(tl.join(first * cos - second * sin, first * sin + second * cos), (ROWS, BLOCK))
    tl.store(at, x.to(at.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["length"])  # type: ignore[untyped-decorator]
def _qk_norm_rope_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
    q_batch, q_row, k_batch, k_row, length, eps,
    C: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    HAS_K: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Apply RMSNorm over all channels and the rotation to q's rows, with `HAS_K` also to k's; angles `[L, HALF]`."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_i64 = row.to(tl.int64)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    in_width = col < C
    in_length = row[:, None] < length
    mask = in_length & in_width
    cos = 1.0
    sin = 0.0
    if ROTATE:
        pair = tl.arange(0, BLOCK // 2)[None, :]
        angle_at = row[:, None] * HALF + pair % HALF
        angle_mask = in_length & (pair < C // 2)
        cos = tl.load(cos_ptr + angle_at, angle_mask, 0.0)
        sin = tl.load(sin_ptr + angle_at, angle_mask, 0.0)
    q_at = q_ptr + batch * q_batch + row_i64 * q_row + col
    _rms_norm_rotate(q_at, q_weight_ptr + col, mask, in_width, cos, sin, eps, C, BLOCK, ROWS, ROTATE)
    if HAS_K:
        k_at = k_ptr + batch * k_batch + row_i64 * k_row + col
        _rms_norm_rotate(k_at, k_weight_ptr + col, mask, in_width, cos, sin, eps, C, BLOCK, ROWS, ROTATE)


def norm(x: Tensor, parameters: Norm, dtype: torch.dtype) -> Tensor:
    """See `plain.norm`."""
    if torch.is_grad_enabled():
        return plain.norm(x, parameters, dtype)
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    launch_residual_norm(x, None, None, parameters, out)
    return out


def residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, norm: Norm, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `plain.residual_norm`."""
    if torch.is_grad_enabled():
        return plain.residual_norm(x, y, gate, norm)
    out = y if out is None else out
    launch_residual_norm(x, y, gate, norm, out)
    return x, out


def qk_norm_rope(qk: Tensor, weight: Tensor, norm: QKNorm) -> Tensor:
    """See `plain.qk_norm_rope`; works in place."""
    if torch.is_grad_enabled():
        return plain.qk_norm_rope(qk, weight, norm)
    _launch_qk_norm_rope(qk, None, weight, None, norm)
    heads: Tensor = qk.unflatten(-1, (norm.num_heads, -1))
    return heads


def qk_norm_rope_pair(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, norm: QKNorm) -> tuple[Tensor, Tensor]:
    """See `plain.qk_norm_rope_pair`; works in place, with one launch that reads the angles once for both."""
    if torch.is_grad_enabled():
        return plain.qk_norm_rope_pair(q, k, q_weight, k_weight, norm)
    _launch_qk_norm_rope(q, k, q_weight, k_weight, norm)
    return q.unflatten(-1, (norm.num_heads, -1)), k.unflatten(-1, (norm.num_heads, -1))


def linear_gelu(x: Tensor, weight: Weight, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """See `plain.linear_gelu`; bias and tanh-GELU run in the product's epilogue (cublasLt `EPILOGUE_GELU_BIAS`)."""
    if torch.is_grad_enabled():
        return plain.linear_gelu(x, weight, bias)
    hidden = x.new_empty(*x.shape[:-1], weight.shape[0]) if out is None else out
    matrix = weight.dense(x.dtype)
    for x_LC, hidden_LF in zip(x, hidden, strict=True):
        torch.ops.aten._addmm_activation.out(bias, x_LC, matrix.t(), use_gelu=True, out=hidden_LF)
    return hidden


def launch_residual_norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, norm: Norm, out: Tensor, scale: Tensor | None = None
) -> None:
    """Launch for x, y, out `[B, L, C]`, with any strides over B and L; gate `[B, C]` or `[1, C]`.

    `scale`: of an `out` in 8 bits, `[B, L, 1]`.
    """
    batch, length, width = x.shape
    weight, bias = norm.weight, norm.bias
    read = x if y is None else y
    _require_dense_channels(x, read, out, weight, bias, *(() if gate is None else (gate,)))
    block, rows, warps = launch_shape(width)
    with on_device_of(x):
        _residual_norm_kernel[(triton.cdiv(length, rows), batch)](
            x, read, out, weight if gate is None else gate, weight, bias, weight if scale is None else scale,
            x.stride(0), x.stride(1), read.stride(0), read.stride(1), out.stride(0), out.stride(1),
            0 if gate is None else _batch_stride(gate), _batch_stride(weight), _batch_stride(bias),
            0 if scale is None else scale.stride(0), 0 if scale is None else scale.stride(1),
            length, norm.eps,
            C=width, BLOCK=block, ROWS=rows, HAS_Y=y is not None, HAS_GATE=gate is not None,
            LARGEST=0.0 if scale is None else LARGEST[out.dtype], num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip


def _launch_qk_norm_rope(q: Tensor, k: Tensor | None, q_weight: Tensor, k_weight: Tensor | None, norm: QKNorm) -> None:
    batch, length, width = q.shape
    rope = norm.rope
    second = q if k is None else k
    _require_dense_channels(q, second, q_weight)
    cos, sin = (q_weight, q_weight) if rope is None else (rope.cos.contiguous(), rope.sin.contiguous())
    block, rows, warps = launch_shape(width)
    with on_device_of(q):
        _qk_norm_rope_kernel[(triton.cdiv(length, rows), batch)](
            q, second, q_weight, q_weight if k_weight is None else k_weight, cos, sin,
            q.stride(0), q.stride(1), second.stride(0), second.stride(1), length, norm.eps,
            C=width, HALF=cos.shape[-1], BLOCK=block, ROWS=rows, HAS_K=k is not None, ROTATE=rope is not None,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip


def launch_shape(width: int) -> tuple[int, int, int]:
    """Return the columns, rows and warps of a program for rows of `width` channels."""
    block = triton.next_power_of_2(width)
    return block, max(1, 2048 // block), max(4, min(16, block // 512))


def _batch_stride(x: Tensor) -> int:
    """Return the stride over the batch; 0 if one row `[1, C]` serves the whole batch."""
    return 0 if x.shape[0] == 1 else x.stride(0)


def _require_dense_channels(*tensors: Tensor) -> None:
    if any(x.stride(-1) != 1 for x in tensors):
        raise ValueError("Fused kernels need channels that lie side by side in memory.")


TRITON_KERNELS = Kernels(
    "triton", norm, residual_norm, qk_norm_rope, qk_norm_rope_pair, plain.linear, linear_gelu, text_attention
)
