"""Checks fused kernels: compares each operation with its plain form on short random tensors."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from wanduet.kernels.dit.plain import TORCH_KERNELS, Kernels, Norm, QKNorm
from wanduet.kernels.dit.quantized import DTYPES, TORCH_QUANTIZED, EightBits, QuantizedKernels, QuantizedRows
from wanduet.kernels.dit.rope import Rope, rope_for_grid
from wanduet.kernels.dit.weight import Weight
from wanduet.kernels.vae.plain import VAE_TORCH_KERNELS, Filter, Fused, VAEKernels


@torch.no_grad()
def largest_error(
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    operations: Iterable[str] | None = None,
    heads: int = 3,
    head_dim: int = 128,
) -> float:
    """Return the largest relative error of the transformer's kernels against their plain forms, on short sequences.

    `operations`: names of the fields of `Kernels` to check, by default all.
    """
    samples = _Samples(torch.Generator().manual_seed(0), device, dtype, heads=heads, head_dim=head_dim)
    errors = []
    for operation in CASES if operations is None else operations:
        for case in CASES[operation]:
            got, expected = (case(k, samples.restarted()) for k in (kernels, TORCH_KERNELS))
            errors += [relative(a, b) for a, b in zip(got, expected, strict=True)]
    return _largest(errors)


@torch.no_grad()
def largest_quantized_error(
    kernels: QuantizedKernels,
    device: torch.device,
    dtype: torch.dtype,
    format: EightBits,
    operations: Iterable[str] | None = None,
    widths: tuple[int, int] = (3, 128),
) -> float:
    """Return the largest relative error of the operations around products in 8 bits, in a model that computes in `dtype`.

    `operations`: names of the fields of `QuantizedKernels`, by default all. `widths`: heads, and channels of a head.
    """
    samples = _Samples(torch.Generator().manual_seed(0), device, dtype, heads=widths[0], head_dim=widths[1])
    errors = []
    for operation in QUANTIZED_CASES if operations is None else operations:
        case = QUANTIZED_CASES[operation]
        got, expected = (case(k, samples.restarted(), DTYPES[format]) for k in (kernels, TORCH_QUANTIZED))
        errors += [relative(a, b) for a, b in zip(got, expected, strict=True)]
    return _largest(errors)


@torch.no_grad()
def largest_vae_error(
    kernels: VAEKernels,
    device: torch.device,
    dtype: torch.dtype,
    base_dim: int,
    operations: Iterable[str] | None = None,
) -> float:
    """Return the largest relative error of the VAE's kernels. `operations`: keys of `VAE_CASES`, by default all.

    The cases have the widths and options of the decoder's last block but one, so that the decoder uses the kernels that
    are compiled here.
    """
    errors = []
    for operation in VAE_CASES if operations is None else operations:
        draw = _VAESamples(torch.Generator().manual_seed(0), device, dtype, base_dim)
        errors += VAE_CASES[operation](kernels, draw)
    return _largest(errors)


def relative(got: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of `expected`."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def _largest(errors: list[float]) -> float:
    return max(errors, key=lambda error: float("inf") if error != error else error)


@dataclass(frozen=True, slots=True)
class _Samples:
    """Random tensors, equal after each restart. The sizes are odd, so that masks are checked."""

    generator: torch.Generator
    device: torch.device
    dtype: torch.dtype
    batch: int = 2
    length: int = 37
    heads: int = 3
    head_dim: int = 128

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def restarted(self) -> "_Samples":
        self.generator.manual_seed(0)
        return self

    def draw(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype)

    def tokens(self, dtype: torch.dtype) -> Tensor:
        """Return `[B, L, C]` as a slice of a longer sequence: not contiguous over the batch."""
        return self.draw(self.batch, self.length + 6, self.width, dtype=dtype)[:, 2:-4]

    def row(self) -> Tensor:
        return self.draw(self.batch, self.width)

    def rope(self) -> Rope:
        return rope_for_grid((1, 1, self.length), self.head_dim, self.device)


_Case = Callable[[Kernels, _Samples], tuple[Tensor, ...]]


def _norm(kernels: Kernels, s: _Samples) -> tuple[Tensor, ...]:
    return (kernels.norm(s.tokens(torch.float32), Norm(s.row(), s.row()[:1], 1e-6), s.dtype),)


def _residual_norm(kernels: Kernels, s: _Samples) -> tuple[Tensor, ...]:
    x, y = s.tokens(torch.float32), s.tokens(s.dtype)
    return kernels.residual_norm(x, y, None, Norm(s.row()[:1], s.row()[:1], 1e-6), None)


def _gated_residual_norm(kernels: Kernels, s: _Samples) -> tuple[Tensor, ...]:
    x, y = s.tokens(torch.float32), s.tokens(s.dtype)
    return kernels.residual_norm(x, y, s.row(), Norm(s.row(), s.row(), 1e-6), torch.empty_like(y))


def _qk(kernels: Kernels, s: _Samples) -> tuple[Tensor, ...]:
    return (kernels.qk_norm_rope(s.tokens(s.dtype), s.draw(s.width), QKNorm(1e-6, s.heads)),)


def _qk_pair(kernels: Kernels, s: _Samples) -> tuple[Tensor, ...]:
    q, k, _ = s.draw(s.batch, s.length, 3 * s.width, dtype=s.dtype).chunk(3, dim=-1)
    return kernels.qk_norm_rope_pair(q, k, s.draw(s.width), s.draw(s.width), QKNorm(1e-6, s.heads, s.rope()))


def _linear(kernels: Kernels, s: _Samples) -> tuple[Tensor, ...]:
    weight = Weight(s.draw(s.width, s.width, dtype=s.dtype) / s.width**0.5)
    x, bias, out = s.tokens(s.dtype), s.draw(s.width, dtype=s.dtype), s.tokens(s.dtype)
    return kernels.linear(x, weight, bias, None), kernels.linear(x, weight, bias, out)


def _linear_gelu(kernels: Kernels, s: _Samples) -> tuple[Tensor, ...]:
    weight = Weight(s.draw(2 * s.width, s.width, dtype=s.dtype) / s.width**0.5)
    x, bias = s.tokens(s.dtype), s.draw(2 * s.width, dtype=s.dtype)
    out = torch.empty(*x.shape[:2], 2 * s.width, dtype=s.dtype, device=x.device)
    return kernels.linear_gelu(x, weight, bias, None), kernels.linear_gelu(x, weight, bias, out)


def _text(num_keys: int) -> _Case:
    def case(kernels: Kernels, s: _Samples) -> tuple[Tensor, ...]:
        keys, values = (s.draw(s.batch, num_keys, s.heads, s.head_dim, dtype=s.dtype) for _ in range(2))
        return (kernels.text_attention(s.tokens(s.dtype), s.draw(s.width), 1e-6, keys, values, 9),)

    return case


# Cases by operation. One kernel processes up to 128 text keys at once, another more keys in blocks.
CASES: dict[str, tuple[_Case, ...]] = {
    "norm": (_norm,),
    "residual_norm": (_residual_norm, _gated_residual_norm),
    "qk_norm_rope": (_qk,),
    "qk_norm_rope_pair": (_qk_pair,),
    "linear": (_linear,),
    "linear_gelu": (_linear_gelu,),
    "text_attention": (_text(70), _text(150)),
}


def _written(shape: torch.Size, s: _Samples, dtype: torch.dtype, write: Callable[[QuantizedRows], None]) -> Tensor:
    out = QuantizedRows.empty(shape, dtype, s.device)
    write(out)
    return out.dense(torch.float32)


def _quantize(kernels: QuantizedKernels, s: _Samples, dtype: torch.dtype) -> tuple[Tensor, ...]:
    tensors = s.tokens(s.dtype), s.tokens(torch.float32)
    return tuple(_written(x.shape, s, dtype, partial(kernels.quantize, x)) for x in tensors)


def _quantize_norm(kernels: QuantizedKernels, s: _Samples, dtype: torch.dtype) -> tuple[Tensor, ...]:
    found = []
    for y, gate in ((None, None), (s.tokens(s.dtype), None), (s.tokens(s.dtype), s.row())):
        x, norm = s.tokens(torch.float32), Norm(s.row(), s.row()[:1], 1e-6)
        found += [_written(x.shape, s, dtype, partial(kernels.quantize_norm, x, y, gate, norm)), x]
    return tuple(found)


def _quantize_gelu(kernels: QuantizedKernels, s: _Samples, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x = s.tokens(s.dtype)
    return (_written(x.shape, s, dtype, partial(kernels.quantize_gelu, x)),)


def _quantized_linear(kernels: QuantizedKernels, s: _Samples, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, weight = (QuantizedRows.empty(shape, dtype, s.device) for shape in (s.tokens(s.dtype).shape, 2 * (s.width,)))
    TORCH_QUANTIZED.quantize(s.tokens(torch.float32), x)
    TORCH_QUANTIZED.quantize(s.draw(1, *weight.shape), QuantizedRows(weight.data[None], weight.scale[None]))
    out = torch.empty(x.shape, dtype=s.dtype, device=s.device)
    kernels.quantized_linear(x, weight, s.draw(s.width, dtype=s.dtype), out)
    return (out,)


QUANTIZED_CASES: dict[str, Callable[[QuantizedKernels, _Samples, torch.dtype], tuple[Tensor, ...]]] = {
    "quantize": _quantize,
    "quantize_norm": _quantize_norm,
    "quantize_gelu": _quantize_gelu,
    "quantized_linear": _quantized_linear,
}


@dataclass(frozen=True, slots=True)
class _VAESamples:
    """Random clips. The sizes are odd, so that masks are checked."""

    generator: torch.Generator
    device: torch.device
    dtype: torch.dtype
    base_dim: int

    @property
    def width(self) -> int:
        return 2 * self.base_dim

    def __call__(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.generator).to(self.device, self.dtype)
        return x.to(memory_format=torch.channels_last_3d) if x.ndim == 5 else x

    def convolution(self) -> tuple[Tensor, Tensor]:
        return self(self.width, self.width, 3, 3, 3) / 50, self(self.width)


def _causal_conv(kernels: VAEKernels, draw: _VAESamples) -> list[float]:
    def clone(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.clone()

    width = draw.width
    weight, bias = draw.convolution()
    x, residual = draw(1, width, 3, 5, 7), draw(1, width, 3, 4, 7)
    norm, after = draw(width, 1, 1, 1), draw(width, 1, 1, 1)
    before = draw(1, width, 2, 5, 7)
    past = kernels.causal_conv(before, None, Filter(weight, bias, (1, 0)), Fused(out_gamma=after))[1].clone()
    plain = F.pad(past, (0, 0, 1, 0)) if past.shape[3] == 5 else past  # the plain form's past has the zero rows
    errors = []
    for pads, mine, theirs, added, out_gamma in (
        ((1, 0), past, plain, residual, None),
        ((1, 0), None, None, None, after),
        ((0, 1), None, None, residual, None),
    ):
        for gamma in (norm, None):
            filter, fused = Filter(weight, bias, pads), Fused(gamma, added, out_gamma, consume=True)
            got, _ = kernels.causal_conv(x.clone(), clone(mine), filter, fused)
            expected, _ = VAE_TORCH_KERNELS.causal_conv(x.clone(), clone(theirs), filter, fused)
            errors.append(relative(got, expected))
    return errors


def _double_conv(kernels: VAEKernels, draw: _VAESamples) -> list[float]:
    weight, bias = draw.convolution()
    x = draw(1, draw.width, 3, 5, 7)
    outs = [draw(1, draw.base_dim, 3, 10, 14) for _ in range(2)]
    flat = weight[: draw.base_dim, :, 0].contiguous(memory_format=torch.channels_last)
    for one, out in zip((kernels, VAE_TORCH_KERNELS), outs, strict=True):
        doubled = flat if one.double_weight is None else one.double_weight(flat)
        one.double_conv(x, doubled, bias[: draw.base_dim], (1, 1), out)
    return [relative(*outs)]


def _attend(kernels: VAEKernels, draw: _VAESamples) -> list[float]:
    qkv = draw(2, 48, 3 * draw.width).chunk(3, dim=-1)  # not a whole tile of any product
    return [relative(kernels.attend(*qkv), VAE_TORCH_KERNELS.attend(*qkv))]


VAE_CASES: dict[str, Callable[[VAEKernels, _VAESamples], list[float]]] = {
    "causal_conv": _causal_conv,
    "double_conv": _double_conv,
    "attend": _attend,
}
