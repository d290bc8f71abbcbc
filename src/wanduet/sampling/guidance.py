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
from wanduet.sampling.predictor import Predictor
from wanduet.sampling.samplers import State

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
    """Guidance by both prompts, up to step `gate` of the schedule (None: always). From that step on, only the prompt is
    predicted, so a step is one forward."""

    predict: Predict[Condition]
    positive: Condition
    negative: Condition
    scale: float
    gate: int | None = None

    def __call__(self, latents: Tensor, step: Step) -> Tensor:
        """See Guidance."""
        if self.gate is not None and step.index >= self.gate:
            return self.predict(latents, step, (self.positive,))[0]
        positive, negative = self.predict(latents, step, (self.positive, self.negative))
        return combine(positive, negative, self.scale)


@dataclass(frozen=True, slots=True)
class PairedPredictor(Generic[Condition]):
    """Predictor of two prompts on two ranks: rank 0 of `group` computes the first, rank 1 the second, and they exchange
    velocities. Both get both velocities, bit for bit those that one device would compute.

    A rank does not read the other's condition of a pair. A single condition is computed with `alone`, which all ranks
    share, or without it by each rank alike. Neither predictor has a state.
    """

    predictor: Predictor[Condition]
    group: dist.ProcessGroup
    alone: Predictor[Condition] | None = None

    def __call__(self, latents: Tensor, step: Step, conditions: Sequence[Condition]) -> Sequence[Tensor]:
        """See Predictor. Raises ValueError for more than two conditions."""
        if len(conditions) == 1:
            return (self.alone or self.predictor)(latents, step, conditions)
        if len(conditions) != 2:
            raise ValueError(f"{len(conditions)} prompts cannot be shared by two ranks.")
        (own,) = self.predictor(latents, step, (conditions[dist.get_rank(self.group)],))
        return all_gather(own, self.group)

    def state(self) -> State:
        """See Predictor."""
        return self.predictor.state()

    def restore(self, state: State) -> None:
        """See Predictor."""
        self.predictor.restore(state)


def combine(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Return `negative + scale * (positive - negative)`. The order of operations must not change: it keeps results
    equal bit for bit."""
    return negative + scale * (positive - negative)
