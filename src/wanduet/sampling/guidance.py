"""Classifier-free guidance: combines the velocities of the prompt and of the negative prompt.

Source: Ho & Salimans, arXiv 2207.12598: `negative + scale * (positive - negative)`, here in float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor
from torch import distributed as dist

from wanduet.distributed.collectives import all_gather
from wanduet.kernels.attention.call import Step

Condition = TypeVar("Condition")
# See `predictor.Predictor`. It gets all conditions at once, so that a model can share work between them.
Predict = Callable[[Tensor, Step, Sequence[Condition]], Sequence[Tensor]]
Velocity = Callable[[Tensor, Step], Tensor]


class Guidance(Protocol):
    """Returns the velocity of latents at a step."""

    def __call__(self, latents: Tensor, step: Step) -> Tensor:
        """Latents `[B, 16, T, h, w]` float32 to their velocity, float32, of the same shape."""


@dataclass(frozen=True, slots=True)
class NoGuidance(Generic[Condition]):
    """The velocity of the prompt alone: one forward per step."""

    predict: Predict[Condition]
    positive: Condition

    def __call__(self, latents: Tensor, step: Step) -> Tensor:
        """See Guidance."""
        return self.predict(latents, step, (self.positive,))[0]


@dataclass(frozen=True, slots=True)
class SequentialGuidance(Generic[Condition]):
    """Guidance with both prompts on one device."""

    predict: Predict[Condition]
    positive: Condition
    negative: Condition
    scale: float

    def __call__(self, latents: Tensor, step: Step) -> Tensor:
        """See Guidance."""
        positive, negative = self.predict(latents, step, (self.positive, self.negative))
        return combine(positive, negative, self.scale)


@dataclass(frozen=True, slots=True)
class ParallelGuidance(Generic[Condition]):
    """Guidance with one prompt on each of two ranks, which exchange velocities. Bit for bit equal to
    SequentialGuidance.

    Rank 0 of `group` computes the prompt, rank 1 the negative prompt; `condition` is this rank's prompt.
    """

    predict: Predict[Condition]
    condition: Condition
    scale: float
    group: dist.ProcessGroup

    def __call__(self, latents: Tensor, step: Step) -> Tensor:
        """See Guidance."""
        (own,) = self.predict(latents, step, (self.condition,))
        positive, negative = all_gather(own, self.group)
        return combine(positive, negative, self.scale)


def combine(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Return `negative + scale * (positive - negative)`. The order of operations must not change: it keeps results
    equal bit for bit."""
    return negative + scale * (positive - negative)
