"""Which fused kernels a device gets: Triton's where they work, else the plain PyTorch forms."""

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from wanduet.ops.fused import TORCH_KERNELS, Kernels
from wanduet.ops.precision import EXACT, PRODUCTS, convolutions_use_tf32, vae_precision
from wanduet.ops.rope import Rope, rope_for_grid
from wanduet.ops.vae_fused import VAE_TORCH_KERNELS, VAEKernels
from wanduet.ops.vae_gpu import VAE_TRITON_KERNELS, compiling_for

log = logging.getLogger(__name__)

# Largest relative error against the plain forms on the same inputs: both round once, at other places.
CHECK_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
TF32_TOLERANCE = 2e-3  # factors of 11 bits, which each form rounds in its own way


# What a user loses by plain forms; measured without Triton's kernels: 9 to 21 %, by size and card.
PLAIN_COSTS = "plain PyTorch runs instead, and the denoise takes up to a fifth longer"
PLAIN_PRODUCTS_COST = "cuBLAS's products run instead, and the denoise takes a few percent longer"
PLAIN_VAE_COSTS = "plain PyTorch runs instead: the decode takes longer, and may need more memory than was planned"


@PRODUCTS.at(EXACT)
def kernels_for(device: torch.device, dtype: torch.dtype, heads: int = 3, head_dim: int = 128) -> Kernels:
    """The fastest kernels that work on `device` when computing in `dtype`.

    Triton's kernels are compiled and compared with the plain forms on short sequences before they are trusted; if Triton
    is missing or they are wrong, the log says so and the plain forms are returned. Kernels are compiled for a width:
    with a model's `heads` and `head_dim`, those are tried, and compiled, that it will use.
    """

    def faster() -> tuple[Kernels, float]:
        from wanduet.ops.triton_kernels import TRITON_KERNELS

        return TRITON_KERNELS, largest_error(TRITON_KERNELS, device, dtype, heads=heads, head_dim=head_dim)

    kernels = _trusted("Triton's kernels", faster, TORCH_KERNELS, device, CHECK_TOLERANCE[dtype], PLAIN_COSTS)
    if kernels is TORCH_KERNELS or not has_quack(device, dtype):
        return kernels

    def faster_products() -> tuple[Kernels, float]:
        from wanduet.ops import quack_products

        found = replace(
            kernels,
            name=f"{kernels.name}+quack",
            linear=quack_products.linear,
            linear_gelu=quack_products.linear_gelu,
        )
        return found, largest_error(found, device, dtype, (_linear, _linear_gelu), heads, head_dim)

    return _trusted("quack's products", faster_products, kernels, device, CHECK_TOLERANCE[dtype], PLAIN_PRODUCTS_COST)


def vae_kernels_for(
    device: torch.device, dtype: torch.dtype, base_dim: int, tf32: bool | None = None
) -> VAEKernels:  # fmt: skip
    """The same for a VAE, with its least number of channels (see `VAESpec`) and its precision (see `WanVAE.tf32`)."""

    def faster() -> tuple[VAEKernels, float]:
        return VAE_TRITON_KERNELS, largest_vae_error(VAE_TRITON_KERNELS, device, dtype, base_dim)

    with vae_precision(tf32):
        tolerance = max(CHECK_TOLERANCE[dtype], TF32_TOLERANCE if convolutions_use_tf32() else 0.0)
        return _trusted(
            "Triton's kernels for the VAE", faster, VAE_TORCH_KERNELS, device, tolerance, PLAIN_VAE_COSTS
        )  # fmt: skip


def planned_vae_kernels(device: str) -> VAEKernels:
    """What `vae_kernels_for` will give on a device that need not be here, for a prediction.

    A GPU elsewhere is taken to have Triton; where GPUs are here, it is known whether there is (on Windows it mostly is not).
    """
    return VAE_TRITON_KERNELS if plans_fused_kernels(device) else VAE_TORCH_KERNELS


def plans_fused_kernels(device: str) -> bool:
    """Whether `kernels_for` will give Triton's on such a device; see `planned_vae_kernels`."""
    without = torch.cuda.is_available() and not _has_triton()
    return torch.device(device).type == "cuda" and not without


def vae_kernels_to_compile(device: torch.device, tf32: bool | None = None) -> VAEKernels | None:
    """For a run on the meta device that leaves the kernels of `device` compiled; None where nothing is compiled."""
    return compiling_for(device, tf32) if device.type == "cuda" and _has_triton() else None


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def has_quack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether quack-kernels is there, which flash-attn-4 brings, and has products for that GPU."""
    if device.type != "cuda" or dtype.itemsize != 2 or importlib.util.find_spec("quack") is None:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def reason_of(problem: Exception, most: int = 160) -> str:
    """Why a library failed, in one line that a person can read: its kind and the first line of what it says."""
    if isinstance(problem, torch.OutOfMemoryError):
        return "too little memory was free at that moment"
    first = (str(problem).strip().splitlines() or [""])[0].strip()
    text = f"{type(problem).__name__}: {first}" if first else type(problem).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


Set = TypeVar("Set", Kernels, VAEKernels)


def _trusted(
    what: str, faster: Callable[[], tuple[Set, float]], plain: Set, device: torch.device, tolerance: float, costs: str
) -> Set:
    """The faster kernels if they run on a GPU and are right; else the plain ones, and one sentence in the log."""
    if device.type != "cuda":
        return plain
    try:
        kernels, error = faster()
    except Exception as problem:  # a compiler's failure can be anything
        log.warning("%s cannot be used here (%s): %s.", what, reason_of(problem), costs)
        log.info("%s failed.", what, exc_info=problem)
        return plain
    if not error <= tolerance:  # also true for NaN
        log.warning("%s are wrong here (error %.1e): %s.", what, error, costs)
        return plain
    return kernels


@torch.no_grad()
def largest_vae_error(kernels: VAEKernels, device: torch.device, dtype: torch.dtype, base_dim: int) -> float:
    """Largest relative error of any operation against its plain form, on small random tensors. Convolutions are those of
    the decoder's last block but one, in the combinations that it has, so that what is compiled here is used there."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator).to(device, dtype)
        return x.to(memory_format=torch.channels_last_3d) if x.ndim == 5 else x

    def clone(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.clone()

    width = 2 * base_dim
    x, residual = draw(1, width, 3, 5, 7), draw(1, width, 3, 4, 7)
    weight, bias = draw(width, width, 3, 3, 3) / 50, draw(width)
    norm, after = draw(width, 1, 1, 1), draw(width, 1, 1, 1)
    before = draw(1, width, 2, 5, 7)
    past = kernels.causal_conv(before, None, weight, bias, (1, 0), out_gamma=after)[1].clone()
    plain = F.pad(past, (0, 0, 1, 0)) if past.shape[3] == 5 else past  # the plain form's past has the zero rows
    errors = []
    for pads, mine, theirs, added, out_gamma in (
        ((1, 0), past, plain, residual, None),
        ((1, 0), None, None, None, after),
        ((0, 1), None, None, residual, None),
    ):
        for gamma in (norm, None):
            inputs = (weight, bias, pads, gamma, added)
            got, _ = kernels.causal_conv(x.clone(), clone(mine), *inputs, consume=True, out_gamma=out_gamma)
            expected, _ = VAE_TORCH_KERNELS.causal_conv(x.clone(), clone(theirs), *inputs, out_gamma=out_gamma)
            errors.append(_relative(got, expected))
    outs = [draw(1, base_dim, 3, 10, 14) for _ in range(2)]
    flat = weight[:base_dim, :, 0].contiguous(memory_format=torch.channels_last)
    for one, out in zip((kernels, VAE_TORCH_KERNELS), outs, strict=True):
        doubled = flat if one.double_weight is None else one.double_weight(flat)
        one.double_conv(x, doubled, bias[:base_dim], (1, 1), out)
    errors.append(_relative(*outs))
    qkv = draw(2, 48, 3 * width).chunk(3, dim=-1)  # no whole square of any product
    errors.append(_relative(kernels.attend(*qkv), VAE_TORCH_KERNELS.attend(*qkv)))
    return max(errors, key=lambda error: float("inf") if error != error else error)


def largest_error(
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    cases: "Sequence[_Case] | None" = None,
    heads: int = 3,
    head_dim: int = 128,
) -> float:
    """Largest relative error of any operation (or of those of `cases`) against its plain form, on short random sequences."""
    samples = _Samples(torch.Generator().manual_seed(0), device, dtype, heads=heads, head_dim=head_dim)
    errors = []
    with torch.no_grad():
        for case in cases or (_norm, _residual_norm, _gated_residual_norm, _qk, _qk_pair, _linear, _linear_gelu, _text):
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
    return kernels.residual_norm(x, y, None, s.row()[:1], s.row()[:1], 1e-6, None)


def _gated_residual_norm(kernels: Kernels, s: _Samples) -> tuple[Tensor, ...]:
    x, y = s.tokens(torch.float32), s.tokens(s.dtype)
    return kernels.residual_norm(x, y, s.row(), s.row(), s.row(), 1e-6, torch.empty_like(y))


def _qk(kernels: Kernels, s: _Samples) -> tuple[Tensor, ...]:
    return (kernels.qk_norm_rope(s.tokens(s.dtype), s.draw(s.width), 1e-6, s.heads, None),)


def _qk_pair(kernels: Kernels, s: _Samples) -> tuple[Tensor, ...]:
    q, k, _ = s.draw(s.batch, s.length, 3 * s.width, dtype=s.dtype).chunk(3, dim=-1)
    return kernels.qk_norm_rope_pair(q, k, s.draw(s.width), s.draw(s.width), 1e-6, s.heads, s.rope())


def _linear(kernels: Kernels, s: _Samples) -> tuple[Tensor, ...]:
    weight = s.draw(s.width, s.width, dtype=s.dtype) / s.width**0.5
    x, bias, out = s.tokens(s.dtype), s.draw(s.width, dtype=s.dtype), s.tokens(s.dtype)
    return kernels.linear(x, weight, bias, None), kernels.linear(x, weight, bias, out)


def _linear_gelu(kernels: Kernels, s: _Samples) -> tuple[Tensor, ...]:
    weight = s.draw(2 * s.width, s.width, dtype=s.dtype) / s.width**0.5
    x, bias = s.tokens(s.dtype), s.draw(2 * s.width, dtype=s.dtype)
    out = torch.empty(*x.shape[:2], 2 * s.width, dtype=s.dtype, device=x.device)
    return kernels.linear_gelu(x, weight, bias, None), kernels.linear_gelu(x, weight, bias, out)


def _text(kernels: Kernels, s: _Samples) -> tuple[Tensor, ...]:
    keys, values = (s.draw(s.batch, 70, s.heads, s.head_dim, dtype=s.dtype) for _ in range(2))
    return (kernels.text_attention(s.tokens(s.dtype), s.draw(s.width), 1e-6, keys, values, 9),)


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())
