"""Which of a scheduler's steps a call makes, and the latents that an input video begins with, as in diffusers."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Schedule:
    """The steps of a call: `num_inference_steps` or the given `timesteps`, and of these the last share `strength`."""

    num_inference_steps: int
    timesteps: Sequence[float] | None = None
    strength: float = 1.0

    def check(self, scheduler: Any) -> None:
        """Raise ValueError for timesteps that the scheduler does not take, and for a scheduler without noise levels."""
        if not (hasattr(scheduler, "add_noise") or hasattr(scheduler, "scale_noise")):
            raise ValueError(f"{type(scheduler).__name__} has neither add_noise nor scale_noise: set pipe.scheduler.")
        if self.timesteps is None:
            return
        if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"{type(scheduler).__name__} takes no timesteps=: give num_inference_steps=.")
        if len(self.timesteps) == 0:
            raise ValueError("timesteps must not be empty.")

    def set(self, scheduler: Any, device: torch.device) -> tuple[int, int]:
        """Set the scheduler's timesteps.

        Returns the number of steps to make, and the index of their first timestep; a step of a second-order scheduler
        has two.
        """
        if self.timesteps is None:
            scheduler.set_timesteps(self.num_inference_steps, device=device)
            total = self.num_inference_steps
        else:
            scheduler.set_timesteps(timesteps=self.timesteps, device=device)
            total = len(scheduler.timesteps)
        kept = min(int(total * self.strength), total)
        return kept, (total - kept) * getattr(scheduler, "order", 1)


def with_noise(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Add noise to latents `[V, 16, T, h, w]`, at the level of the scheduler's begin index.

    `timesteps`: the first timestep, for each of the noise's rows.
    """
    if hasattr(scheduler, "add_noise"):
        noisy: Tensor = scheduler.add_noise(latents, noise, timesteps)
    else:
        noisy = scheduler.scale_noise(latents, timesteps, noise)
    return noisy
