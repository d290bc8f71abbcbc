"""Classifier-free guidance: combines the velocities of the prompt and of the negative prompt.

Source: Ho & Salimans, arXiv 2207.12598: `negative + scale * (positive - negative)`, here in float32. Other modes: see
`family.guidance`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from wanduet.distributed.collectives import all_gather
from wanduet.family.guidance import GuidanceMode
from wanduet.kernels.attention.call import Step
from wanduet.sampling.predictor import Predictor
from wanduet.sampling.samplers import State

Condition = TypeVar("Condition")
Velocity = Callable[[Tensor, Step], Tensor]
# APG, as used with Wan2.1: momentum -0.75, and a norm of at most 55 for latents of 480x832x81 (MultiTalk). Here the norm
# grows with the root of the latents' size, so that a limit of their root mean square is the same for all videos.
APG_MOMENTUM = -0.75
APG_RMS = 55 / math.prod((16, 21, 60, 104)) ** 0.5


class Guidance(Protocol):
    """Returns the velocity of latents at a step. Its state contains the predictor's."""

    def __call__(self, latents: Tensor, step: Step) -> Tensor:
        """Latents `[B, 16, T, h, w]` float32 to their velocity, float32, of the same shape."""

    def state(self) -> State:
        """See Predictor."""

    def restore(self, state: State) -> None:
        """See Predictor."""


class Combination:
    """Combines the velocities of the prompt and of the negative prompt in one of the modes of `family.guidance`."""

    def __init__(self, scale: float, mode: GuidanceMode = "cfg") -> None:
        """`scale`: the guidance scale, above 1."""
        self._scale, self._mode = scale, mode
        self._momentum: Tensor | None = None  # of APG: the sum of the differences so far, with falling weights

    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Both `[B, 16, T, h, w]` float32, to the guided velocity of that shape. With APG, call it once a step."""
        if self._mode == "cfg-zero":
            return combine(positive, negative * projection(positive, negative), self._scale)
        if self._mode == "apg":
            return self._projected(positive, negative)
        return combine(positive, negative, self._scale)

    def _projected(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Return the velocity of adaptive projected guidance (arXiv 2410.02416) with eta 0."""
        update = positive - negative
        if self._momentum is not None and self._momentum.shape == update.shape:  # else the video was enlarged
            update = update + APG_MOMENTUM * self._momentum.to(update.device)
        self._momentum = update
        most = APG_RMS * math.prod(update.shape[1:]) ** 0.5
        update = update * (most / update.flatten(1).norm(dim=1)).clamp(max=1.0).view(-1, 1, 1, 1, 1)
        return positive + (self._scale - 1) * (update - projection(update, positive) * positive)

    def state(self) -> State:
        """See Predictor."""
        return {} if self._momentum is None else {"guidance_momentum": self._momentum}

    def restore(self, state: State) -> None:
        """See Predictor. The state may have other entries."""
        self._momentum = state.get("guidance_momentum")


@dataclass(frozen=True, slots=True)
class NoGuidance(Generic[Condition]):
    """The velocity of the prompt alone: one forward per step."""

    predict: Predictor[Condition]
    positive: Condition

    def __call__(self, latents: Tensor, step: Step) -> Tensor:
        """See Guidance."""
        return self.predict(latents, step, (self.positive,))[0]

    def state(self) -> State:
        """See Guidance."""
        return self.predict.state()

    def restore(self, state: State) -> None:
        """See Guidance."""
        self.predict.restore(state)


@dataclass(frozen=True, slots=True)
class SequentialGuidance(Generic[Condition]):
    """Guidance by both prompts in the steps `guided` of the schedule (None: in all). In the other steps, only the prompt
    is predicted, so that they are one forward; in the first `num_zero_steps`, nothing is, and the velocity is 0."""

    predict: Predictor[Condition]
    positive: Condition
    negative: Condition
    combination: Combination
    guided: range | None = None
    num_zero_steps: int = 0

    def __call__(self, latents: Tensor, step: Step) -> Tensor:
        """See Guidance."""
        if step.index < self.num_zero_steps:
            return torch.zeros_like(latents)
        if self.guided is not None and step.index not in self.guided:
            return self.predict(latents, step, (self.positive,))[0]
        positive, negative = self.predict(latents, step, (self.positive, self.negative))
        return self.combination(positive, negative)

    def state(self) -> State:
        """See Guidance."""
        return self.predict.state() | self.combination.state()

    def restore(self, state: State) -> None:
        """See Guidance."""
        self.predict.restore(state)
        self.combination.restore(state)


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


def projection(x: Tensor, onto: Tensor) -> Tensor:
    """Return for each of the batch the factor by which `onto` is x without what is orthogonal to it; 0 for a zero `onto`.
    Both `[B, 16, T, h, w]`, the result `[B, 1, 1, 1, 1]`. Sums are in float64."""
    dims = (1, 2, 3, 4)
    product = (x * onto).sum(dims, keepdim=True, dtype=torch.float64)
    return (product / (onto.square().sum(dims, keepdim=True, dtype=torch.float64) + 1e-8)).to(x.dtype)
