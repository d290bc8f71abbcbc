"""Updates of one parameter: how a LoRA, LoHa, LoKr, DoRA or a whole difference changes it. All sums are in float32."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # headers are read and checked before torch is imported
    from torch import Tensor


class Update(Protocol):
    """The change of one parameter. Its factors stay in the dtype in which the file stores them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        ...

    def applied(self, base: "Tensor", strength: float) -> "Tensor":
        """Return the updated parameter, float32 [shape], on `base`'s device.

        `base`: the parameter before any update, float32 [shape]; it is not written to. A strength of 0 returns it
        itself.
        """
        ...


class _Change(ABC):
    """A change that does not depend on the base: base + strength · delta."""

    shape: tuple[int, ...]

    @abstractmethod
    def delta(self, like: "Tensor") -> "Tensor":
        """Return the change in float32 [shape], on `like`'s device."""

    def applied(self, base: "Tensor", strength: float) -> "Tensor":
        """Return base + strength · delta."""
        return base if strength == 0 else base.add(self.delta(base), alpha=strength)


@dataclass(frozen=True, eq=False)
class Difference(_Change):
    """A whole difference (`diff`, `diff_b`, `diff_m`), multiplied by `scale`."""

    shape: tuple[int, ...]
    value: "Tensor"
    scale: float = 1.0

    def delta(self, like: "Tensor") -> "Tensor":
        """Return the stored difference."""
        return _on(like, self.value).reshape(self.shape) * self.scale


@dataclass(frozen=True, eq=False)
class LoRA(_Change):
    """scale · B·A. `down`: A [r, in], `up`: B [out, r]; convolutions' have further axes."""

    shape: tuple[int, ...]
    down: "Tensor"
    up: "Tensor"
    scale: float

    def delta(self, like: "Tensor") -> "Tensor":
        """Return the product."""
        product = _on(like, self.up).flatten(1) @ _on(like, self.down).flatten(1)
        return product.mul_(self.scale).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class LoHa(_Change):
    """scale · (w1_a·w1_b) ⊙ (w2_a·w2_b). `factors`: w1_a [out, r], w1_b [r, in], w2_a, w2_b."""

    shape: tuple[int, ...]
    factors: "tuple[Tensor, Tensor, Tensor, Tensor]"
    scale: float

    def delta(self, like: "Tensor") -> "Tensor":
        """Return the elementwise product of both products."""
        w1_a, w1_b, w2_a, w2_b = (_on(like, factor) for factor in self.factors)
        return (w1_a @ w1_b).mul_(w2_a @ w2_b).mul_(self.scale).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class LoKr(_Change):
    """scale · (w1 ⊗ w2). Each of both is given as one matrix, or as two whose product it is."""

    shape: tuple[int, ...]
    w1: "tuple[Tensor, ...]"
    w2: "tuple[Tensor, ...]"
    scale: float

    def delta(self, like: "Tensor") -> "Tensor":
        """Return the Kronecker product; a convolution's taps belong to w2."""
        import torch

        taps = self.shape[2:]
        w1, w2 = (_product([_on(like, factor).flatten(1) for factor in w]) for w in (self.w1, self.w2))
        w2 = w2.reshape(w2.shape[0], -1, *taps)
        return torch.kron(w1.reshape(*w1.shape, *(1 for _ in taps)), w2).mul_(self.scale).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class DoRA:
    """W′ = m · V / ‖V‖ with V = W + delta, and W + strength · (W′ − W). Source: https://arxiv.org/abs/2402.09353.

    `magnitude`: m, [out, 1] or [1, in] (with further axes of 1 for convolutions); the norm is taken over all other axes.
    """

    change: _Change
    magnitude: "Tensor"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self.change.shape

    def applied(self, base: "Tensor", strength: float) -> "Tensor":
        """Return the weight with new directions and magnitudes."""
        import torch

        if strength == 0:
            return base
        moved = base + self.change.delta(base)
        magnitude = _on(base, self.magnitude)
        others = [axis for axis, size in enumerate(magnitude.shape) if size == 1]
        norm = torch.linalg.vector_norm(moved, dim=others, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        return base.lerp(moved.mul_(magnitude / norm), strength)


@dataclass(frozen=True, eq=False)
class Several:
    """Updates of one parameter, applied one after another (a LoRA and a whole difference of the same weight)."""

    updates: "Sequence[Update]"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self.updates[0].shape

    def applied(self, base: "Tensor", strength: float) -> "Tensor":
        """Return the parameter after all updates."""
        for update in self.updates:
            base = update.applied(base, strength)
        return base


def _on(like: "Tensor", factor: "Tensor") -> "Tensor":
    """Return a stored tensor in float32 on another's device."""
    import torch

    return factor.to(like.device, torch.float32)


def _product(matrices: "Sequence[Tensor]") -> "Tensor":
    return matrices[0] if len(matrices) == 1 else matrices[0] @ matrices[1]
