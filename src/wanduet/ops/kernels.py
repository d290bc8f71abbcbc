"""Which fused kernels a device gets: Triton's where they work, else the plain PyTorch forms."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wanduet.ops.fused import TORCH_KERNELS, Kernels
from wanduet.ops.rope import Rope, rope_for_grid

# Largest relative error against the plain forms on the same inputs: both round once, at other places.
CHECK_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def kernels_for(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest kernels that work on `device` when computing in `dtype`.

    Triton's kernels are compiled and compared with the plain forms on small tensors before they are
    trusted; if Triton is missing or they are wrong, a warning is given and the plain forms are returned.
    """
    if device.type != "cuda":
        return TORCH_KERNELS
    try:
        from wanduet.ops.triton_kernels import TRITON_KERNELS

        error = largest_error(TRITON_KERNELS, device, dtype)
    except Exception as problem:  # a compiler's failure can be anything
        warnings.warn(f"Triton kernels cannot be used here, plain PyTorch runs instead: {problem!r}", RuntimeWarning)
        return TORCH_KERNELS
    if not error <= CHECK_TOLERANCE[dtype]:  # also true for NaN
        warnings.warn(f"Triton kernels are wrong here (error {error:.1e}), plain PyTorch runs instead.", RuntimeWarning)
        return TORCH_KERNELS
    return TRITON_KERNELS


def largest_error(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> float:
    """Largest relative error of any operation against its plain form, on small random tensors."""
    samples = _Samples(torch.Generator().manual_seed(0), device, dtype)
    errors = []
    with torch.no_grad():
        for case in (_norm, _residual_norm, _gated_residual_norm, _qk, _qk_pair, _linear_gelu):
            got, expected = (case(k, samples.restarted()) for k in (kernels, TORCH_KERNELS))
            errors += [_relative(a, b) for a, b in zip(got, expected, strict=True)]
    return max(errors, key=lambda error: float("inf") if error != error else error)


@dataclass(frozen=True, slots=True)
class _Samples:
    """Random tensors, the same ones after each restart. Sizes are odd on purpose: masks must work."""

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
        """`[B, L, C]` as a chunk of a longer sequence: not contiguous over the batch."""
        return self.draw(self.batch, self.length + 6, self.width, dtype=dtype)[:, 2:-4]

    def row(self) -> Tensor:
        return self.draw(self.batch, self.width)

    def rope(self) -> Rope:
        return rope_for_grid((1, 1, self.length), self.head_dim, self.device)


_Case = Callable[[Kernels, _Samples], tuple[Tensor, ...]]


def _norm(kernels: Kernels, s: _Samples) -> tuple[Tensor, ...]:
    return (kernels.norm(s.tokens(torch.float32), s.row(), s.row()[:1], 1e-6, s.dtype),)


def _residual_norm(kernels: Kernels, s: _Samples) -> tuple[Tensor, ...]:
    x, y = s.tokens(torch.float32), s.tokens(s.dtype)
    return kernels.residual_norm(x, y, None, s.row()[:1], s.row()[:1], 1e-6)


def _gated_residual_norm(kernels: Kernels, s: _Samples) -> tuple[Tensor, ...]:
    x, y = s.tokens(torch.float32), s.tokens(s.dtype)
    return kernels.residual_norm(x, y, s.row(), s.row(), s.row(), 1e-6)


def _qk(kernels: Kernels, s: _Samples) -> tuple[Tensor, ...]:
    return (kernels.qk_norm_rope(s.tokens(s.dtype), s.draw(s.width), 1e-6, s.heads, None),)


def _qk_pair(kernels: Kernels, s: _Samples) -> tuple[Tensor, ...]:
    q, k, _ = s.draw(s.batch, s.length, 3 * s.width, dtype=s.dtype).chunk(3, dim=-1)
    return kernels.qk_norm_rope_pair(q, k, s.draw(s.width), s.draw(s.width), 1e-6, s.heads, s.rope())


def _linear_gelu(kernels: Kernels, s: _Samples) -> tuple[Tensor, ...]:
    weight = s.draw(2 * s.width, s.width, dtype=s.dtype) / s.width**0.5
    return (kernels.linear_gelu(s.tokens(s.dtype), weight, s.draw(2 * s.width, dtype=s.dtype)),)


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())
