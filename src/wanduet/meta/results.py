"""What some of PyTorch's operations return on the meta device, told at once.

PyTorch's own answer for these is written in Python and goes through layers of general cases: half a millisecond for each
call, of which the prediction of a decode makes thousands, after an import of the whole compiler. Here are only the cases
that the models have; a rule that is not sure says `NotImplemented`, and PyTorch answers.
"""

from collections.abc import Callable, Sequence
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
    """What `func` gives for tensors on the meta device; `NotImplemented` where PyTorch is to be asked."""
    rule = RULES.get(func)
    if rule is None:
        return NotImplemented
    first = args[0][0] if isinstance(args[0], (list, tuple)) and args[0] else args[0]
    device = first.device if isinstance(first, Tensor) else kwargs.get("device")
    return rule(*args, **kwargs) if device == META else NotImplemented


def _in_place(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _like(x: Tensor, dtype: torch.dtype | None = None, device: torch.device = META) -> Tensor:
    """Its shape, without the gaps between its elements but in their order in memory."""
    strides, size = [0] * x.ndim, 1
    for dim in sorted(range(x.ndim), key=lambda dim: (x.stride(dim), -dim)):
        strides[dim] = size
        size *= x.shape[dim]
    return torch.empty_strided(x.shape, strides, dtype=dtype or x.dtype, device=device)


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
    return _like(x, dtype, device or META) if _is_spread(x) else NotImplemented


def _alike(x: Tensor, *others: Any, **_: Any) -> Any:
    """Element by element, of one tensor and numbers."""
    plain = x.is_floating_point() and not any(isinstance(other, (Tensor, complex)) for other in others)
    return _like(x) if plain else NotImplemented


def _together(x: Tensor, y: Any, **_: Any) -> Any:
    """Element by element, of two tensors of one dtype, one of which has the result's shape, and its layout in memory."""
    if not isinstance(y, Tensor):
        return _alike(x, y)
    if not (y.is_meta and x.dtype == y.dtype and x.is_floating_point()):
        return NotImplemented
    shape = _broadcast(x.shape, y.shape)
    if x.shape != shape != y.shape:
        return x.new_empty(shape) if x.is_contiguous() and y.is_contiguous() else NotImplemented
    model = x if x.shape == shape else y
    return _like(model) if _is_spread(model) else NotImplemented


def _broadcast(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    pairs = zip_longest(reversed(a), reversed(b), fillvalue=1)
    return tuple(m if n == 1 else n for m, n in pairs)[::-1]


def _is_spread(x: Tensor) -> bool:
    """Whether no two elements share memory, so that the order of the dimensions is plain."""
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
    return _like(x), x.new_empty(statistics), x.new_empty(statistics)


def _softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    return _alike(x) if dtype is None else NotImplemented


def _cat(parts: Sequence[Tensor], dim: int = 0) -> Any:
    layouts = {_layout(part) for part in parts}
    if not _are_of_a_kind(parts) or len(layouts) > 1 or None in layouts:
        return NotImplemented
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return _laid_out(parts[0], shape, layouts.pop())


def _stack(parts: Sequence[Tensor], dim: int = 0) -> Any:
    if not _are_of_a_kind(parts) or {_layout(part) for part in parts} != {torch.contiguous_format}:
        return NotImplemented
    shape = list(parts[0].shape)
    shape.insert(dim % (len(shape) + 1), len(parts))
    return parts[0].new_empty(shape)


def _are_of_a_kind(parts: Sequence[Tensor]) -> bool:
    first = parts[0]
    return first.ndim > 0 and all(part.dtype == first.dtype and part.ndim == first.ndim for part in parts)


def _layout(x: Tensor) -> torch.memory_format | None:
    """In which order its dimensions lie in memory, gaps or not; None for any other than the usual two."""
    for layout, last in ((torch.contiguous_format, ()), (CHANNELS_LAST.get(x.ndim), (1,))):
        dims = [dim for dim in (*(d for d in range(x.ndim) if d not in last), *last) if x.shape[dim] > 1]
        if layout is not None and all(x.stride(a) > x.stride(b) > 0 for a, b in pairwise(dims)):
            return layout
    return None


def _laid_out(x: Tensor, shape: Sequence[int], layout: torch.memory_format | None) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=META, memory_format=layout or torch.contiguous_format)


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, strides: Sequence[int], pads: Sequence[int], gaps: Sequence[int],
    transposed: bool, *_: Any,
) -> Any:  # fmt: skip
    """With the channels last where one of the two has them so, as cuDNN does it. (PyTorch's own answer leaves that open.)"""
    if transposed or x.ndim != weight.ndim:
        return NotImplemented
    sizes = zip(x.shape[2:], weight.shape[2:], strides, pads, gaps, strict=True)
    shape = [(size + 2 * pad - gap * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, pad, gap in sizes]
    last = {_layout(x), _layout(weight)} - {None, torch.contiguous_format}
    return _laid_out(x, [x.shape[0], weight.shape[0], *shape], last.pop() if last else None)


def _enlarge(x: Tensor, size: Sequence[int], *_: Any) -> Any:
    layout = _layout(x)
    return NotImplemented if layout is None else _laid_out(x, [*x.shape[:2], *size], layout)


def _count_up(end: int | float, *, dtype: torch.dtype | None = None, **_: Any) -> Any:
    return NotImplemented if dtype is None else torch.empty(ceil(end), dtype=dtype, device=META)


def _product(bias: Tensor, x: Tensor, weight: Tensor, **_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _products(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], y.shape[2])


def _product_out(*_: Any, out: Tensor, **__: Any) -> Tensor:
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
    aten.clamp.default: _alike,
    aten.cos.default: _alike,
    aten.exp.default: _alike,
    aten.gelu.default: _alike,
    aten.neg.default: _alike,
    aten.silu.default: _alike,
    aten.sin.default: _alike,
    aten.clamp_min.default: _alike,
    aten.pow.Tensor_Scalar: _alike,
    aten.rsqrt.default: _alike,
    aten.mul.Scalar: _alike,
    aten.add.Tensor: _together,
    aten.sub.Tensor: _together,
    aten.mul.Tensor: _together,
    aten.div.Tensor: _together,
    aten.mean.dim: _mean,
    aten.linalg_vector_norm.default: _norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.arange.default: _count_up,
    aten.cat.default: _cat,
    aten.clone.default: _empty_like,
    aten.convolution.default: _convolution,
    aten.stack.default: _stack,
    aten.empty_like.default: _empty_like,
    aten.addmm.default: _product,
    aten.bmm.default: _products,
    aten.addmm.out: _product_out,
}
# PyTorch may rename these, which are its own.
PRIVATE = {"_safe_softmax": _softmax, "_upsample_nearest_exact2d": _enlarge}
RULES |= {getattr(aten, name).default: rule for name, rule in PRIVATE.items() if hasattr(aten, name)}
