"""The predictor of velocities for the denoising loop; it may have a state from step to step."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from wanduet.kernels.attention.call import Step
from wanduet.sampling.samplers import State

Condition = TypeVar("Condition", contravariant=True)
# Sees the latents before a step, the step, and the velocity of each prompt; changes none of them.
OnPredict = Callable[[Tensor, Step, Sequence[Tensor]], None]


class Predictor(Protocol[Condition]):
    """Predicts velocities, with one transformer, two experts, or a cache that skips work by results of earlier steps.

    Its state is saved in the checkpoints of a denoise, so that a resumed denoise makes the same latents. Ranks that
    share a sequence must all have the same state: the checkpoint contains rank 0's.
    """

    def __call__(self, latents: Tensor, step: Step, conditions: Sequence[Condition]) -> Sequence[Tensor]:
        """Return one velocity, float32, per condition, for latents `[B, 16, T, h, w]` float32 before a step."""

    def state(self) -> State:
        """Return the state after the last step: tensors, numbers, strings, and lists of them; {} for no state."""

    def restore(self, state: State) -> None:
        """Restore a state; {} is the state before the first step."""
