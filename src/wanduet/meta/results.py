"""Fast rules for the results of some PyTorch operations on the meta device.

PyTorch's own implementations of these are written in Python and handle all cases: half a millisecond a call, of which
the prediction of a decode makes thousands, after an import of the whole compiler. The rules cover only the cases that
the models need. A rule returns `NotImplemented` for any other case, for which PyTorch's implementation is called.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise, zip_longest
from math import ceil
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

META = torch.device("meta")
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

Rule = Callable[..., Any]


def meta_result(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The result of the operation `func` on meta tensors; `NotImplemented` if PyTorch must compute it."""
    rule = RULES.get(func)
    if rule is None:
        return NotImplemented
    first = args[0][0] if isinstance(args[0], (list, tuple)) and args[0] else args[0]
    device = first.device if isinstance(first, Tensor) else kwargs.get("device")
    return rule(*args, **kwargs) if device == META else NotImplemented


def _in_place(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _dense_like(x: Tensor, dtype: torch.dtype | None = None, device: torch.device = META) -> Tensor:
    """A dense tensor of x's shape, with its dimensions in the same order in memory."""
    return torch.empty_strided(x.shape, _dense(x.shape, x.stride()), dtype=dtype or x.dtype, device=device)


@lru_cache(4096)  # a decode asks for few shapes, each thousands of times
def _dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    dense, size = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda dim: (strides[dim], -dim)):
        dense[dim] = size
        size *= shape[dim]
    return tuple(dense)


def _empty_like(
    x: Tensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    memory_format: torch.memory_format | None = None,
    **_: Any,
) -> Any:
    if memory_format not in (None, torch.preserve_format):
        return torch.empty(x.shape, dtype=dtype or x.dtype, device=device or META, memory_format=memory_format)
    return _dense_like(x, dtype, device or META) if _has_no_overlap(x) else NotImplemented


def _unary(x: Tensor, *others: Any, **_: Any) -> Any:
    """Elementwise, of one tensor and numbers."""
    plain = x.is_floating_point() and not any(isinstance(other, (Tensor, complex)) for other in others)
    return _dense_like(x) if plain else NotImplemented


def _binary(x: Tensor, y: Any, **_: Any) -> Any:
    """Elementwise, of two tensors of the same dtype; the one with the result's shape decides its memory layout."""
    if not isinstance(y, Tensor):
        return _unary(x, y)
    if not (y.is_meta and x.dtype == y.dtype and x.is_floating_point()):
        return NotImplemented
    shape = _broadcast(x.shape, y.shape)
    if x.shape != shape != y.shape:
        return x.new_empty(shape) if x.is_contiguous() and y.is_contiguous() else NotImplemented
    model = x if x.shape == shape else y
    return _dense_like(model) if _has_no_overlap(model) else NotImplemented


def _broadcast(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    pairs = zip_longest(reversed(a), reversed(b), fillvalue=1)
    return tuple(m if n == 1 else n for m, n in pairs)[::-1]


def _has_no_overlap(x: Tensor) -> bool:
    """Whether no two elements share memory (strides of 0), so that the order of the dimensions is unambiguous."""
    return all(stride or size == 1 for size, stride in zip(x.shape, x.stride(), strict=True))


def _reduced(x: Tensor, dims: Sequence[int] | None, keep: bool) -> Any:
    if not dims or not x.is_floating_point():
        return NotImplemented
    over = {dim % x.ndim for dim in dims}
    return x.new_empty([1 if dim in over else size for dim, size in enumerate(x.shape) if keep or dim not in over])


def _mean(x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    return NotImplemented if dtype is not None else _reduced(x, dims, keepdim)


def _norm(x: Tensor, power: Any = 2, dims: Sequence[int] | None = None, keepdim: bool = False, **other: Any) -> Any:
    return NotImplemented if other else _reduced(x, dims, keepdim)


def _layer_norm(x: Tensor, shape: Sequence[int], *_: Any) -> Any:
    if x.dtype != torch.float32:
        return NotImplemented
    statistics = [*x.shape[: -len(shape)], *[1] * len(shape)]
    return _dense_like(x), x.new_empty(statistics), x.new_empty(statistics)


def _softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    return _unary(x) if dtype is None else NotImplemented


def _cat(parts: Sequence[Tensor], dim: int = 0) -> Any:
    layouts = {_layout(part) for part in parts}
    if not _same_dtype_and_ndim(parts) or len(layouts) > 1 or None in layouts:
        return NotImplemented
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return _empty(parts[0], shape, layouts.pop())


def _stack(parts: Sequence[Tensor], dim: int = 0) -> Any:
    if not _same_dtype_and_ndim(parts) or {_layout(part) for part in parts} != {torch.contiguous_format}:
        return NotImplemented
    shape = list(parts[0].shape)
    shape.insert(dim % (len(shape) + 1), len(parts))
    return parts[0].new_empty(shape)


def _same_dtype_and_ndim(parts: Sequence[Tensor]) -> bool:
    first = parts[0]
    return first.ndim > 0 and all(part.dtype == first.dtype and part.ndim == first.ndim for part in parts)


def _layout(x: Tensor) -> torch.memory_format | None:
    """The memory format by the order of strides, with or without gaps; None if neither contiguous nor channels last."""
    return _layout_of(x.shape, x.stride())


@lru_cache(4096)
def _layout_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.memory_format | None:
    ndim = len(shape)
    for layout, last in ((torch.contiguous_format, ()), (CHANNELS_LAST.get(ndim), (1,))):
        dims = [dim for dim in (*(d for d in range(ndim) if d not in last), *last) if shape[dim] > 1]
        if layout is not None and all(strides[a] > strides[b] > 0 for a, b in pairwise(dims)):
            return layout
    return None


def _empty(x: Tensor, shape: Sequence[int], layout: torch.memory_format | None) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=META, memory_format=layout or torch.contiguous_format)


def _convolution(  # the parameters of `aten::convolution`, which calls it
    x: Tensor, weight: Tensor, bias: Tensor | None, strides: Sequence[int], pads: Sequence[int], gaps: Sequence[int],
    transposed: bool, *_: Any,
) -> Any:  # fmt: skip
    """Channels last if input or weight is, as cuDNN does. (PyTorch's meta implementation leaves it open.)"""
    if transposed or x.ndim != weight.ndim:
        return NotImplemented
    sizes = zip(x.shape[2:], weight.shape[2:], strides, pads, gaps, strict=True)
    shape = [(size + 2 * pad - gap * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, pad, gap in sizes]
    last = {_layout(x), _layout(weight)} - {None, torch.contiguous_format}
    return _empty(x, [x.shape[0], weight.shape[0], *shape], last.pop() if last else None)


def _interpolate(x: Tensor, size: Sequence[int], *_: Any) -> Any:
    layout = _layout(x)
    return NotImplemented if layout is None else _empty(x, [*x.shape[:2], *size], layout)


def _arange(end: int | float, *, dtype: torch.dtype | None = None, **_: Any) -> Any:
    return NotImplemented if dtype is None else torch.empty(ceil(end), dtype=dtype, device=META)


def _addmm(bias: Tensor, x: Tensor, weight: Tensor, **_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _bmm(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], y.shape[2])


def _addmm_out(*_: Any, out: Tensor, **__: Any) -> Tensor:
    return out


RULES: dict[Any, Rule] = {
    aten.clamp_.default: _in_place,
    aten.gelu_.default: _in_place,
    aten.round_.default: _in_place,
    aten.silu_.default: _in_place,
    aten.add_.Tensor: _in_place,
    aten.addcmul_.default: _in_place,
    aten.mul_.Tensor: _in_place,
    aten.bitwise_and_.Scalar: _in_place,
    aten.clamp.default: _unary,
    aten.cos.default: _unary,
    aten.exp.default: _unary,
    aten.gelu.default: _unary,
    aten.neg.default: _unary,
    aten.silu.default: _unary,
    aten.sin.default: _unary,
    aten.clamp_min.default: _unary,
    aten.pow.Tensor_Scalar: _unary,
    aten.rsqrt.default: _unary,
    aten.mul.Scalar: _unary,
    aten.add.Tensor: _binary,
    aten.sub.Tensor: _binary,
    aten.mul.Tensor: _binary,
    aten.div.Tensor: _binary,
    aten.mean.dim: _mean,
    aten.linalg_vector_norm.default: _norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.arange.default: _arange,
    aten.cat.default: _cat,
    aten.clone.default: _empty_like,
    aten.convolution.default: _convolution,
    aten.stack.default: _stack,
    aten.empty_like.default: _empty_like,
    aten.addmm.default: _addmm,
    aten.bmm.default: _bmm,
    aten.addmm.out: _addmm_out,
}
# Private operations, which PyTorch may rename.
PRIVATE = {"_safe_softmax": _softmax, "_upsample_nearest_exact2d": _interpolate}
RULES |= {getattr(aten, name).default: rule for name, rule in PRIVATE.items() if hasattr(aten, name)}
