"""Selects the kernels of a device, operation by operation: Triton's if they work, else the plain PyTorch forms."""

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from wanduet.kernels.check import (
    CASES,
    QUANTIZED_CASES,
    VAE_CASES,
    largest_error,
    largest_quantized_error,
    largest_vae_error,
)
from wanduet.kernels.dit.plain import TORCH_KERNELS, Kernels
from wanduet.kernels.dit.quantized import TORCH_QUANTIZED, EightBits, QuantizedKernels
from wanduet.kernels.precision import EXACT, PRODUCTS, convolutions_use_tf32, vae_precision
from wanduet.kernels.vae.gpu import VAE_TRITON_KERNELS, compiling_for
from wanduet.kernels.vae.plain import VAE_TORCH_KERNELS, VAEKernels
from wanduet.kernels.verdicts import (
    IN_A_JOB,
    MEMORY_SHORT,
    guard,
    plain_operations,
    reason_of,
    remember,
    remember_failure,
    triton_problem,
)

log = logging.getLogger(__name__)

# Largest allowed relative error against the plain forms on the same inputs: both round once, but at different places.
CHECK_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
QUANTIZED_TOLERANCE = 1e-2  # a value between two of 8 bits may be rounded to either
TF32_TOLERANCE = 2e-3  # operands of 11 bits, which the two forms round differently

# Names of sets of kernels, in messages and in recorded verdicts.
TRITON, VAE_TRITON, QUACK = "Triton's kernels", "Triton's kernels for the VAE", "quack's products"
QUANTIZED = "kernels for products in 8 bits"
# What plain forms cost the user. Measured without Triton's kernels: 9 to 21 %, depending on size and card.
COSTS = {
    TRITON: "plain PyTorch runs instead, and the denoise takes up to a fifth longer",
    QUACK: "cuBLAS's products run instead, and the denoise takes a few percent longer",
    QUANTIZED: "plain PyTorch runs instead, and the denoise takes longer than with exact products",
    VAE_TRITON: "plain PyTorch runs instead: the decode takes longer, and may need more memory than was planned",
}
# The fields of a set that are replaced together, by the name of their operation.
_OPERATIONS = {name: (name,) for name in CASES}
_QUANTIZED_OPERATIONS = {name: (name,) for name in QUANTIZED_CASES}
_VAE_OPERATIONS = {name: (name,) for name in VAE_CASES} | {"double_conv": ("double_weight", "double_conv")}

Set = TypeVar("Set", Kernels, VAEKernels, QuantizedKernels)


@PRODUCTS.at(EXACT)
def kernels_for(device: torch.device, dtype: torch.dtype, heads: int = 3, head_dim: int = 128) -> Kernels:
    """Return the fastest kernels that work on `device` in `dtype`.

    Each Triton kernel is compiled and compared with its plain form on short sequences. If it does not compile, does not
    fit in memory or is wrong, a warning is logged and the plain form is used. Kernels are compiled for a width: pass a
    model's `heads` and `head_dim` to check and compile the kernels that it uses.
    """

    def triton() -> Kernels:
        from wanduet.kernels.dit.gpu import TRITON_KERNELS

        return TRITON_KERNELS

    def quack() -> Kernels:
        from wanduet.kernels.dit import quack

        name = f"{kernels.name}+quack"
        return replace(kernels, name=name, linear=quack.linear, linear_gelu=quack.linear_gelu)

    def error(tried: Kernels, operation: str) -> float:
        return largest_error(tried, device, dtype, (operation,), heads, head_dim)

    check = _Check(device, dtype, CHECK_TOLERANCE[dtype], _OPERATIONS)
    kernels = check.judged(TRITON, triton, TORCH_KERNELS, error)
    if kernels is TORCH_KERNELS or not has_quack(device, dtype):
        return kernels
    return check.judged(QUACK, quack, kernels, error)


@PRODUCTS.at(EXACT)
def quantized_kernels_for(
    device: torch.device,
    dtype: torch.dtype,
    format: EightBits,
    widths: tuple[int, int, int],
    folder: Path | None,
) -> QuantizedKernels:
    """Return the fastest operations around products in 8 bits of a model that computes in `dtype`; see `kernels_for`.

    `widths`: heads, channels of a head, channels of the feed-forward. Products are timed once on a machine, which is stored
    in `folder`.
    """
    heads, head_dim, hidden = widths

    def triton() -> QuantizedKernels:
        from wanduet.kernels.choose_product import choose_product

        return choose_product(device, dtype, format, (heads * head_dim, hidden), folder)

    def error(tried: QuantizedKernels, operation: str) -> float:
        return largest_quantized_error(tried, device, dtype, format, (operation,), (heads, head_dim))

    check = _Check(device, dtype, QUANTIZED_TOLERANCE, _QUANTIZED_OPERATIONS)
    return check.judged(QUANTIZED, triton, TORCH_QUANTIZED, error)


def vae_kernels_for(
    device: torch.device, dtype: torch.dtype, base_dim: int, tf32: bool | None = None
) -> VAEKernels:  # fmt: skip
    """Return the fastest kernels for a VAE that work on `device` in `dtype`; see `kernels_for`.

    `base_dim`: the VAE's smallest number of channels (see `VAESpec`). `tf32`: its precision (see `WanVAE.tf32`).
    """

    def error(tried: VAEKernels, operation: str) -> float:
        return largest_vae_error(tried, device, dtype, base_dim, (operation,))

    with vae_precision(tf32):
        tolerance = max(CHECK_TOLERANCE[dtype], TF32_TOLERANCE if convolutions_use_tf32() else 0.0)
        check = _Check(device, dtype, tolerance, _VAE_OPERATIONS)
        return check.judged(VAE_TRITON, lambda: VAE_TRITON_KERNELS, VAE_TORCH_KERNELS, error)


@dataclass(frozen=True, slots=True)
class _Check:
    """Checks a set of kernels. `operations`: by operation, the fields that are replaced with it."""

    device: torch.device
    dtype: torch.dtype
    tolerance: float
    operations: Mapping[str, tuple[str, ...]]

    def judged(self, what: str, offered: Callable[[], Set], plain: Set, error: Callable[[Set, str], float]) -> Set:
        """Return the offered kernels on a GPU, with plain forms for those that fail or are wrong, which it logs."""
        if self.device.type != "cuda":
            return plain
        try:
            faster = offered()
        except Exception as failure:  # a broken library can raise any exception
            log.info("%s failed.", what, exc_info=failure)
            self._drop(what, dict.fromkeys(self.operations, reason_of(failure)), all_of_them=True)
            return plain
        kernels, taken = plain, 0
        dropped: dict[str, str] = {}
        for operation, fields in self.operations.items():
            better: dict[str, Any] = {field: getattr(faster, field) for field in fields}
            if all(getattr(plain, field) is one for field, one in better.items()):
                continue
            problem = self._problem(operation, replace(kernels, **better), error)
            if problem:
                dropped[operation] = problem
            else:
                kernels, taken = replace(kernels, **better), taken + 1
        self._drop(what, dropped, all_of_them=not taken)
        if not taken and dropped:
            return plain
        return faster if not dropped else replace(kernels, name=f"{faster.name} without {', '.join(dropped)}")

    def _problem(self, operation: str, tried: Set, error: Callable[[Set, str], float]) -> str:
        """Return the reason why an operation must not be used; empty if it works."""
        if operation in (plain_operations(IN_A_JOB, self.device) or ()):
            return "it failed in a job"
        try:
            found = error(tried, operation)
        except Exception as failure:  # a compiler can raise any exception
            log.info("%s failed.", operation, exc_info=failure)
            return reason_of(failure)
        return "" if found <= self.tolerance else f"wrong, error {found:.1e}"  # also if the error is NaN

    def _drop(self, what: str, problems: Mapping[str, str], all_of_them: bool) -> None:
        """Log the operations that are not used, and record them for plans."""
        lasting = [operation for operation, problem in problems.items() if problem != MEMORY_SHORT]
        if lasting or not problems:
            remember(what, self.device, self.dtype, lasting)
        if problems:
            which = "" if all_of_them else f" ({', '.join(problems)})"
            log.warning("%s%s cannot be used here (%s): %s.", what, which, next(iter(problems.values())), COSTS[what])


def guarded(kernels: Set) -> Set:
    """Return the same kernels, whose operations raise KernelFailedError with their name if compiling or launching
    fails."""
    operations, plain = _parts(kernels)
    own = {name: getattr(kernels, name) for name in operations}
    forms: dict[str, Any] = {n: guard(n, run) for n, run in own.items() if run is not getattr(plain, n)}
    return replace(kernels, **forms)


AnySet = Kernels | VAEKernels | QuantizedKernels


def _parts(kernels: AnySet) -> tuple[Mapping[str, tuple[str, ...]], AnySet]:
    """Return a set's operations, each with its fields, and the plain set."""
    if isinstance(kernels, QuantizedKernels):
        return _QUANTIZED_OPERATIONS, TORCH_QUANTIZED
    if isinstance(kernels, VAEKernels):
        return _VAE_OPERATIONS, VAE_TORCH_KERNELS
    return _OPERATIONS, TORCH_KERNELS


def without(kernels: Set, operation: str, device: torch.device) -> Set:
    """Return the same kernels with the plain form of an operation that failed on `device`; record the failure, so that
    the operation is not tried again."""
    remember_failure(operation, device)
    operations, plain = _parts(kernels)
    forms: dict[str, Any] = {field: getattr(plain, field) for field in operations[operation]}
    return replace(kernels, name=f"{kernels.name} without {operation}", **forms)


def planned_vae_kernels(device: str) -> VAEKernels:
    """Predict the result of `vae_kernels_for` on a device, which may be absent.

    If one of Triton's kernels is known to fail, returns the plain kernels, which need more memory.
    """
    return VAE_TRITON_KERNELS if plans_triton(VAE_TRITON, device) else VAE_TORCH_KERNELS


def plans_triton(what: str, name: str) -> bool:
    """Return True if a set of kernels is expected to have no plain form on a device: TRITON, VAE_TRITON or QUANTIZED.

    Assume Triton on an absent GPU; for a present one, use the recorded verdicts or look for what Triton lacks.
    """
    device = torch.device(name)
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type == "cuda"
    seen = plain_operations(what, device)
    sets: dict[str, Mapping[str, Any]] = {VAE_TRITON: _VAE_OPERATIONS, QUANTIZED: _QUANTIZED_OPERATIONS}
    failed = set(plain_operations(IN_A_JOB, device) or ()) & set(sets.get(what, _OPERATIONS))
    return not failed and (triton_problem() is None if seen is None else not seen)


def vae_kernels_to_compile(device: torch.device, tf32: bool | None = None) -> VAEKernels | None:
    """Return kernels for a run on the meta device that compiles the kernels of `device`; None if none are compiled."""
    return compiling_for(device, tf32) if device.type == "cuda" and has_triton() else None


def has_triton() -> bool:
    """Return True if the package `triton` is installed."""
    return importlib.util.find_spec("triton") is not None


def has_quack(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if quack-kernels (a dependency of flash-attn-4) is installed and has matrix products for that GPU."""
    if device.type != "cuda" or dtype.itemsize != 2 or importlib.util.find_spec("quack") is None:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)
