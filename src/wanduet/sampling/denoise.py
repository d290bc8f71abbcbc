"""The denoising loop, the only one. It calls a velocity function and does not depend on models."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wanduet.errors import CancelledError, NonFiniteLatentsError
from wanduet.kernels.attention.call import Step
from wanduet.kernels.host_copy import HostCopy
from wanduet.sampling.guidance import Velocity
from wanduet.sampling.samplers import Sampler


@dataclass(frozen=True, slots=True)
class StepInfo:
    """A finished step: the latents after it, `[B, 16, T, h, w]` float32, and the seconds since the loop began."""

    step: int  # from 0
    num_steps: int
    timestep: float
    sigma: float  # noise level before the step, 0..1
    latents: Tensor
    seconds: float


# Returns the latents to continue with, or None to keep those of the step.
OnStep = Callable[[StepInfo], Tensor | None]
# Only sees the step.
Watch = Callable[[StepInfo], None]


def denoise(
    velocity: Velocity,
    latents: Tensor,
    sampler: Sampler,
    *,
    on_step: OnStep | None = None,
    should_cancel: Callable[[], bool] | None = None,
    start_step: int = 0,
) -> Tensor:
    """Step latents `[B, 16, T, h, w]` float32 through the sampler's schedule from `start_step`, and return the result.

    Raises CancelledError between steps if `should_cancel()` is True, and NonFiniteLatentsError naming the step after
    which NaN or infinity appeared. This check never makes the host wait for the step just launched: it reads the result
    of the check of the step before.
    """
    guard = _FiniteGuard()
    began = time.perf_counter()
    num_steps = len(sampler.timesteps)
    for step in range(start_step, num_steps):
        if should_cancel is not None and should_cancel():
            raise CancelledError(f"Cancelled before denoising step {step + 1} of {num_steps}.")
        timestep = sampler.timesteps[step]
        latents = sampler.step(velocity(latents, Step(step, timestep)), step, latents)
        guard.watch(step, latents)
        if on_step is not None:
            seconds = time.perf_counter() - began
            info = StepInfo(step, num_steps, timestep, sampler.sigmas[step], latents, seconds)
            replaced = on_step(info)
            if replaced is not None:
                latents = replaced
                guard.watch(step, latents)
    guard.finish()
    return latents


class _FiniteGuard:
    """Starts a check for finite latents after each step, and reads its result one step later."""

    def __init__(self) -> None:
        self._pending: tuple[int, HostCopy] | None = None

    def watch(self, step: int, latents: Tensor) -> None:
        """Start the check of this step. Raises NonFiniteLatentsError if the check of the step before failed."""
        self.finish()
        self._pending = (step, HostCopy(torch.isfinite(latents).all()))

    def finish(self) -> None:
        """Read the pending result. Raises NonFiniteLatentsError."""
        if self._pending is None:
            return
        step, verdict = self._pending
        self._pending = None
        if not bool(verdict.wait()):
            raise NonFiniteLatentsError(step)
