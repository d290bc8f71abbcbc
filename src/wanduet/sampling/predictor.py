"""What predicts a velocity at each step, and may remember something from one step to the next."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from wanduet.sampling.samplers import State

Condition = TypeVar("Condition", contravariant=True)


class Predictor(Protocol[Condition]):
    """Predicts velocities: one transformer, two experts, or one that skips work by what it computed at steps before.

    Its state goes into the checkpoints of a denoise, so that a resumed one makes the same latents. On ranks that share a
    sequence, the state must be the same on all of them: the checkpoint has the first rank's.
    """

    def __call__(self, latents: Tensor, timestep: float, conditions: Sequence[Condition]) -> Sequence[Tensor]:
        """Velocities float32 of latents `[B, 16, T, h, w]` float32 at a timestep in 0..1000, one for each condition."""

    def state(self) -> State:
        """What it needs to go on after the last step: tensors, numbers, texts, and lists of them; {} for nothing."""

    def restore(self, state: State) -> None:
        """Go on from a state; {} is the one before the first step."""
