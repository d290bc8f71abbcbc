"""The sampler of few-step weights: it predicts the video at each step, and adds new noise of the next step's level."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wanduet.sampling.noise import step_noise


class RenoiseSampler:
    """A `Sampler` for weights distilled by DMD, rCM and the like, whose steps depend on no earlier step.

    With velocity v at noise level s, the video is x - s * v; the next latents are (1 - s') * video + s' * noise. The
    noise of a step depends on the seed and the step's number only, so that there is no state to save, and every device
    and rank draws the same. Source: FastVideo's DMD denoising stage; rCM's sampler is the same, begun at a level below 1.
    """

    def __init__(self, timesteps: Sequence[float], seed: int, device: torch.device) -> None:
        """`timesteps`: from 1000 to 0 (excluded), decreasing. `seed`: that of the video."""
        self.timesteps = list(timesteps)
        self.sigmas = [timestep / 1000 for timestep in timesteps] + [0.0]
        self.init_noise_sigma = self.sigmas[0]
        self._seed = seed
        self._device = device

    def begin_at(self, step: int) -> None:
        """See Sampler. No step depends on where the schedule begins."""

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        """See Sampler."""
        now, after = self.sigmas[index : index + 2]
        video = latents - now * velocity
        if after == 0.0:
            return video
        noise = step_noise(latents.shape, self._seed, index)  # on the host, while the device computes the velocity
        if self._device.type == "cuda":  # the host does not wait for a copy from pinned memory
            noise = noise.pin_memory()
        return video * (1.0 - after) + noise.to(self._device, non_blocking=True) * after

    def state(self) -> dict[str, Any]:
        """See Sampler."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """See Sampler."""


def shifted_timesteps(flow_shift: float, num_inference_steps: int) -> list[float]:
    """Return evenly spaced timesteps from 1000 towards 0 (excluded), shifted: 4 steps with shift 5 are 1000, 937.5,
    833.3 and 625."""
    levels = [1.0 - step / num_inference_steps for step in range(num_inference_steps)]
    return [1000.0 * (flow_shift * level / (flow_shift * level + (1.0 - level))) for level in levels]
