"""A sampler whose first steps are those of a smaller video, of which it enlarges the latents.

Enlarging keeps the low frequencies and adds noise at the others. Source: SPEED, arXiv 2605.18736; there, the noise is drawn
anew. Here it is that of the whole video, so that a seed gives about the same video as without enlarging.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wanduet.sampling.noise import initial_noise
from wanduet.sampling.samplers import Sampler, Schedule, State, make_sampler, make_sampler_from

STATE = "is_enlarged"  # in a checkpoint, beside the state of the solver


@dataclass(frozen=True, slots=True)
class Enlargement:
    """After `num_steps` steps, at least one, latents of `small` rows and columns are enlarged to those of `large`."""

    num_steps: int
    small: tuple[int, int]
    large: tuple[int, int]

    @property
    def ratio(self) -> float:
        """How much smaller the values of a picture are after it was enlarged by an orthonormal transform."""
        return math.sqrt(math.prod(self.large) / math.prod(self.small))

    def gain(self, sigma: float) -> float:
        """Return the factor by which enlarged latents and their noise level `sigma` are multiplied, so that picture and
        noise again have the weights `1 - sigma` and `sigma`."""
        return self.ratio / (1 + (self.ratio - 1) * sigma)


class EnlargingSampler:
    """A `Sampler` that makes the first steps of a schedule on small latents, and enlarges the result of the last of them.

    The solver then starts anew at the higher noise level that enlarged latents have, and goes on to the schedule's next
    one. The small latents must have begun with the low frequencies of the video's initial noise (`shrink`): the others are
    added then, so that the video begins with the same noise as without enlarging, on every device and rank.
    """

    init_noise_sigma = 1.0

    def __init__(self, schedule: Schedule, seed: int, device: torch.device, enlargement: Enlargement) -> None:
        """`schedule`: of a sampler other than "renoise". `seed`: that of the video."""
        self._enlargement, self._seed, self._device = enlargement, seed, device
        step = enlargement.num_steps
        self._small = make_sampler(schedule, seed, device)
        self._sigma = self._small.sigmas[step]
        self._large = make_sampler_from(schedule, step, enlargement.gain(self._sigma) * self._sigma, device)
        self._is_enlarged = False
        self.timesteps = self._small.timesteps[:step] + self._large.timesteps[step:]
        self.sigmas = self._small.sigmas[:step] + self._large.sigmas[step:]

    def begin_at(self, step: int) -> None:
        """See Sampler. Raises ValueError for a step beyond those on small latents."""
        if step >= self._enlargement.num_steps:
            raise ValueError(f"Step {step} is not on small latents.")
        self._small.begin_at(step)

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        """See Sampler. After the last step on small latents, the result has the shape of the large ones."""
        result = self._solver.step(velocity, index, latents)
        if index + 1 != self._enlargement.num_steps:
            return result
        self._is_enlarged = True
        # On the host, once a video: in double precision, without memory of the device.
        noise = initial_noise((*result.shape[:-2], *self._enlargement.large), self._seed)
        enlarged = enlarge(result.cpu(), noise, self._sigma) * self._enlargement.gain(self._sigma)
        return enlarged.to(self._device)

    def state(self) -> State:
        """See Sampler."""
        return {STATE: self._is_enlarged} | self._solver.state()

    def restore(self, state: State) -> None:
        """See Sampler."""
        self._is_enlarged = state[STATE]
        self._solver.restore({name: value for name, value in state.items() if name != STATE})

    @property
    def _solver(self) -> Sampler:
        return self._large if self._is_enlarged else self._small


def enlarge(latents: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Return latents `[..., h, w]` of noise level `sigma` with the size of `noise` `[..., H, W]`; all are float32.

    The two-dimensional DCT-II of the result has that of the latents in its low frequencies, and that of `sigma * noise` in
    the others; all transforms are orthonormal.
    """
    rows, columns = latents.shape[-2:]
    small_y, small_x, y, x = map(dct_matrix, (rows, columns, *noise.shape[-2:]))
    result = torch.empty_like(noise)
    # One by one: all pictures of a long video in float64 would take hundreds of megabytes.
    for low, high, out in zip(*(every.flatten(0, -3) for every in (latents, noise, result)), strict=True):
        spectrum = y @ high.double() @ x.T * sigma
        spectrum[:rows, :columns] = small_y @ low.double() @ small_x.T
        out.copy_(y.T @ spectrum @ x)
    return result


def shrink(noise: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the low frequencies of standard normal noise `[..., H, W]` float32 as noise `[..., h, w]` of `size`, which is
    standard normal too."""
    small_y, small_x, y, x = map(dct_matrix, (*size, *noise.shape[-2:]))
    result = noise.new_empty((*noise.shape[:-2], *size))
    down, across = small_y.T @ y[: size[0]], x[: size[1]].T @ small_x
    for whole, out in zip(noise.flatten(0, -3), result.flatten(0, -3), strict=True):
        out.copy_(down @ whole.double() @ across)
    return result


def dct_matrix(size: int) -> Tensor:
    """Return the orthonormal DCT-II of `size` values as a matrix `[frequency, position]`, float64."""
    frequency, position = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (position + 0.5) * frequency) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix
