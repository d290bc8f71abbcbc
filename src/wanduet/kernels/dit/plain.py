"""The transformer's fused operations: matrix products and the element-wise work between them, in few passes.

`Kernels` is the set of operations that the transformer calls; `TORCH_KERNELS` has the plain PyTorch form of each, the
reference for every faster one. All arithmetic is in float32; results are rounded once. With gradients enabled, the
operations are functional; otherwise they work in place, in chunks of tokens, so that no float32 copy of a whole
sequence exists.

Shapes: x `[B, L, C]` float32 residual stream; normed, y `[B, L, C]` in the compute dtype; gate `[B, C]` or `[1, C]`
float32. The weight of a linear layer is a `Weight`, in any format.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from wanduet.kernels.dit.rope import Rope, rotate
from wanduet.kernels.dit.weight import Weight

LinearFn: TypeAlias = Callable[[Tensor, Weight, Tensor, Tensor | None], Tensor]

# Tokens in a chunk of the plain forms: each float32 temporary is 12 MB at width 1536, and about ten exist at once.
CHUNK_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Norm:
    """The parameters of a LayerNorm: weight and bias, each `[B, C]` or `[1, C]` float32, and epsilon.

    A modulated norm has the weight `1 + scale` and the bias `shift`. `is_exact`: the head's, which is not quantized where
    the norms before large products are.
    """

    weight: Tensor
    bias: Tensor
    eps: float
    is_exact: bool = False


@dataclass(frozen=True, slots=True)
class QKNorm:
    """The RMSNorms of q and k, without their weights `[C]`, and the rotation that follows them (None: no rotation)."""

    eps: float
    num_heads: int
    rope: Rope | None = None


@dataclass(frozen=True, slots=True)
class Kernels:
    """One implementation of each fused operation. The functions below document what each computes."""

    name: str
    norm: Callable[[Tensor, Norm, torch.dtype], Tensor]
    residual_norm: Callable[[Tensor, Tensor, Tensor | None, Norm, Tensor | None], tuple[Tensor, Tensor]]
    qk_norm_rope: Callable[[Tensor, Tensor, QKNorm], Tensor]
    qk_norm_rope_pair: Callable[[Tensor, Tensor, Tensor, Tensor, QKNorm], tuple[Tensor, Tensor]]
    linear: LinearFn
    linear_gelu: LinearFn
    text_attention: Callable[[Tensor, Tensor, float, Tensor, Tensor, int], Tensor]


def norm(x: Tensor, parameters: Norm, dtype: torch.dtype) -> Tensor:
    """Return `LayerNorm(x) * weight + bias` in `dtype`."""
    if torch.is_grad_enabled():
        return _norm(x, parameters).to(dtype)
    out = torch.empty_like(x, dtype=dtype)
    for rows in _chunks(x.shape[1]):
        out[:, rows] = _norm(x[:, rows], parameters)
    return out


def residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, norm: Norm, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return `x + gate * y` and its `norm`. Without gradients, the sum overwrites x and the norm `out` (default y)."""
    if torch.is_grad_enabled():
        x = x + (y.float() if gate is None else y.float() * gate[:, None])
        return x, _norm(x, norm).to(y.dtype)
    out = y if out is None else out
    for rows in _chunks(x.shape[1]):
        x_rows, y_rows = x[:, rows], y[:, rows]
        if gate is None:
            x_rows += y_rows
        else:
            x_rows.addcmul_(y_rows.float(), gate[:, None])
        out[:, rows].copy_(_norm(x_rows, norm))
    return x, out


def qk_norm_rope(qk: Tensor, weight: Tensor, norm: QKNorm) -> Tensor:
    """Apply RMSNorm over all channels of q or k `[B, L, C]` (may be strided), then the rotation; return `[B, L, H, D]`.

    The norm spans all heads: Wan applies it before the split into heads. Without gradients, works in place.
    """
    if torch.is_grad_enabled():
        return _qk_norm_rope(qk, weight, norm, norm.rope).to(qk.dtype)
    heads: Tensor = qk.unflatten(-1, (norm.num_heads, -1))
    for rows in _chunks(qk.shape[1]):
        heads[:, rows] = _qk_norm_rope(qk[:, rows], weight, norm, norm.rope.select(rows) if norm.rope else None)
    return heads


def qk_norm_rope_pair(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, norm: QKNorm) -> tuple[Tensor, Tensor]:
    """Apply `qk_norm_rope` to q and to k, which have the same rotation; fused kernels use one launch."""
    return qk_norm_rope(q, q_weight, norm), qk_norm_rope(k, k_weight, norm)


def linear_gelu(x: Tensor, weight: Weight, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """Return `gelu_tanh(x @ weight.T + bias)` `[B, L, F]`; without gradients, written into `out` if passed."""
    if torch.is_grad_enabled():
        return F.gelu(F.linear(x, weight.dense(x.dtype), bias), approximate="tanh")
    hidden = linear(x, weight, bias, out)
    torch.ops.aten.gelu_(hidden, approximate="tanh")
    return hidden


def linear(x: Tensor, weight: Weight, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias` `[B, L, O]`; without gradients, written into `out` if passed."""
    matrix = weight.dense(x.dtype)
    if out is None or torch.is_grad_enabled():
        return F.linear(x, matrix, bias)
    for x_LC, out_LO in zip(x, out, strict=True):
        torch.addmm(bias, x_LC, matrix.t(), out=out_LO)
    return out


def text_attention(q: Tensor, weight: Tensor, eps: float, keys: Tensor, values: Tensor, repeats: int) -> Tensor:
    """Return attention of `qk_norm_rope(q)` `[B, L, C]` to a text's keys and values `[B, S, H, D]`, as `[B, L, C]`.

    The last key and value count `repeats` times: they represent all padding tokens of a prompt, which are equal.
    Without gradients, overwrites q with the result.
    """
    heads = qk_norm_rope(q, weight, QKNorm(eps, keys.shape[2]))
    k, v = (torch.cat((x, x[:, -1:].expand(-1, repeats - 1, -1, -1)), dim=1).transpose(1, 2) for x in (keys, values))
    if torch.is_grad_enabled():
        return F.scaled_dot_product_attention(heads.transpose(1, 2), k, v).transpose(1, 2).flatten(2)
    for rows in _chunks(q.shape[1]):
        attended = F.scaled_dot_product_attention(heads[:, rows].transpose(1, 2), k, v)
        heads[:, rows] = attended.transpose(1, 2)
    return q


def _norm(x: Tensor, norm: Norm) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], eps=norm.eps) * norm.weight[:, None] + norm.bias[:, None]


def _qk_norm_rope(qk: Tensor, weight: Tensor, norm: QKNorm, rope: Rope | None) -> Tensor:
    normed = F.rms_norm(qk.float(), qk.shape[-1:], weight, norm.eps).unflatten(-1, (norm.num_heads, -1))
    return normed if rope is None else rotate(normed, rope)


def _chunks(length: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK_TOKENS, length)) for start in range(0, length, CHUNK_TOKENS))


TORCH_KERNELS = Kernels(
    "torch", norm, residual_norm, qk_norm_rope, qk_norm_rope_pair, linear, linear_gelu, text_attention
)
