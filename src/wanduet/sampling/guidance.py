"""Classifier-free guidance: how the prompt's and the negative prompt's velocities make one.

Source: Ho & Salimans, arXiv 2207.12598: `negative + scale * (positive - negative)`, here in float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor
from torch import distributed as dist

from wanduet.distributed.collectives import all_gather

Condition = TypeVar("Condition")
# As `predictor.Predictor`: what the conditions have in common is the model's to find.
Predict = Callable[[Tensor, float, Sequence[Condition]], Sequence[Tensor]]
Velocity = Callable[[Tensor, float], Tensor]


class Guidance(Protocol):
    """Velocity of latents at a timestep, whatever it takes."""

    def __call__(self, latents: Tensor, timestep: float) -> Tensor:
        """Latents `[B, 16, T, h, w]` float32, timestep in 0..1000; velocity of that shape, float32."""


@dataclass(frozen=True, slots=True)
class NoGuidance(Generic[Condition]):
    """The prompt alone: one forward a step."""

    predict: Predict[Condition]
    positive: Condition

    def __call__(self, latents: Tensor, timestep: float) -> Tensor:
        """See Guidance."""
        return self.predict(latents, timestep, (self.positive,))[0]


@dataclass(frozen=True, slots=True)
class SequentialGuidance(Generic[Condition]):
    """Both prompts on one device."""

    predict: Predict[Condition]
    positive: Condition
    negative: Condition
    scale: float

    def __call__(self, latents: Tensor, timestep: float) -> Tensor:
        """See Guidance."""
        positive, negative = self.predict(latents, timestep, (self.positive, self.negative))
        return combine(positive, negative, self.scale)


@dataclass(frozen=True, slots=True)
class ParallelGuidance(Generic[Condition]):
    """One prompt on each of two ranks, which exchange their velocities: bit for bit as in sequence.

    Rank 0 of `group` takes the prompt, rank 1 the negative prompt; `condition` is this rank's own.
    """

    predict: Predict[Condition]
    condition: Condition
    scale: float
    group: dist.ProcessGroup

    def __call__(self, latents: Tensor, timestep: float) -> Tensor:
        """See Guidance."""
        (own,) = self.predict(latents, timestep, (self.condition,))
        positive, negative = all_gather(own, self.group)
        return combine(positive, negative, self.scale)


def combine(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """`negative + scale * (positive - negative)`; the order of operations is part of the promise."""
    return negative + scale * (positive - negative)
