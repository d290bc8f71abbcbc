"""The samplers: diffusers' schedulers, and one of our own, behind a small interface.

A sampler can save and restore its whole state, and then continues bit for bit. Latents and the solver's arithmetic are
float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wanduet.kernels.precision import NEW_TENSORS
from wanduet.request import ResolvedRequest
from wanduet.sampling.renoise import RenoiseSampler, shifted_timesteps
from wanduet.schedule import SamplerName

State = dict[str, Any]  # tensors, numbers, lists of either, None
# The state of a multistep scheduler between steps, by diffusers' attribute names.
_HISTORY = ("model_outputs", "timestep_list", "lower_order_nums", "last_sample", "this_order", "_step_index")

# The attributes of _HISTORY that are tensors of the latents' shape, or lists of them.
_TENSORS = ("model_outputs", "last_sample")


class Sampler(Protocol):
    """A solver with its schedule, for the denoising loop."""

    timesteps: list[float]  # 1000 (noise) to 0, one per step, as the model takes them
    sigmas: list[float]  # noise level before each step, and after the last, 0..1
    init_noise_sigma: float  # the standard deviation of the noise to begin with, unless there is an input video

    def begin_at(self, step: int) -> None:
        """Leave out the steps before `step`. Call it before the first step only."""

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        """Return the latents after step `index`. All tensors are float32 of one shape."""

    def state(self) -> State:
        """Return the state after the steps so far, for `restore`."""

    def restore(self, state: State) -> None:
        """Restore a state that `state()` returned, and continue from there."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A solver and its steps: at the `timesteps`, or if they are None, `num_inference_steps` of them, of which a higher
    `flow_shift` moves more to higher noise levels."""

    sampler: SamplerName
    flow_shift: float
    num_inference_steps: int
    timesteps: tuple[float, ...] | None = None

    @classmethod
    def of(cls, request: ResolvedRequest) -> Self:
        """Return the schedule of a request, also of those steps that its input video leaves out."""
        return cls(request.sampler, request.flow_shift, request.num_inference_steps, request.timesteps)


class SchedulerSampler:
    """A diffusers scheduler as a `Sampler`. `scheduler` must have its timesteps set."""

    init_noise_sigma = 1.0

    def __init__(self, scheduler: Any, device: torch.device) -> None:
        self._scheduler = scheduler
        self._device = device
        scheduler.set_begin_index(0)  # else every step searches for its index, and waits for the device
        self._steps = list(scheduler.timesteps.cpu())
        self.timesteps = [float(t) for t in self._steps]
        self.sigmas = [float(s) for s in scheduler.sigmas]

    def begin_at(self, step: int, sigma: float | None = None) -> None:
        """See Sampler. `sigma`: the noise level of the latents before that step, by default the schedule's."""
        scheduler = self._scheduler
        scheduler.set_begin_index(step)
        if sigma is not None:
            scheduler.sigmas[step], scheduler.timesteps[step] = sigma, 1000 * sigma
            self._steps[step] = scheduler.timesteps[step]
            self.timesteps[step], self.sigmas[step] = float(self._steps[step]), float(scheduler.sigmas[step])

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        """See Sampler."""
        out: Tensor = self._scheduler.step(velocity, self._steps[index], latents, return_dict=False)[0]
        return out

    def state(self) -> State:
        """See Sampler. Tensors are copied to the host."""
        return {name: _to(getattr(self._scheduler, name), torch.device("cpu")) for name in self._names()}

    def restore(self, state: State) -> None:
        """See Sampler."""
        for name, value in state.items():  # a new scheduler lacks some of these attributes
            setattr(self._scheduler, name, _to(value, self._device))

    def _names(self) -> list[str]:
        return [name for name in _HISTORY if hasattr(self._scheduler, name)]


class LinearSampler(SchedulerSampler):
    """A sampler for schedulers whose steps are linear: each result is a weighted sum of the step's inputs and the
    scheduler's stored tensors, with weights that depend on the schedule only. Most schedulers are.

    The scheduler's step runs on the host, on unit vectors, and gives the weights; the device only computes the sums.
    The scheduler's own step on the device would make the host wait about a dozen times (it copies small tensors and
    solves equations), and leave the device idle.
    """

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        """See Sampler."""
        scheduler, names = self._scheduler, [name for name in _TENSORS if hasattr(self._scheduler, name)]
        values = [getattr(scheduler, name) for name in names]
        listed = [x for value in values for x in (value if isinstance(value, list) else [value])]
        given = (velocity, latents, *(x for x in listed if x is not None))
        units = torch.eye(len(given), dtype=torch.float64)[:, None]  # `[1, n]` each: schedulers need a batch dimension
        waiting = iter(units[2:])
        for name in names:
            setattr(scheduler, name, _each(getattr(scheduler, name), lambda _: next(waiting)))
        with NEW_TENSORS.at(torch.float32):  # not the program's default dtype: bfloat16 schedules change the video
            result = scheduler.step(units[0], self._steps[index], units[1], return_dict=False)[0]
        for name in names:
            setattr(scheduler, name, _each(getattr(scheduler, name), lambda shares: _sum(shares, given)))
        return _sum(result, given)


def make_sampler(schedule: Schedule, seed: int, device: torch.device) -> Sampler:
    """Return a new sampler. `seed`: that of the video, for the noise that some samplers add between steps."""
    if schedule.sampler == "renoise":
        steps, timesteps = schedule.num_inference_steps, schedule.timesteps
        return RenoiseSampler(timesteps or shifted_timesteps(schedule.flow_shift, steps), seed, device)
    return _linear(schedule, device)


def make_sampler_from(schedule: Schedule, step: int, sigma: float, device: torch.device) -> Sampler:
    """Return a new sampler that begins at step `step` with latents of noise level `sigma`, in place of the schedule's.

    Raises ValueError for the sampler "renoise".
    """
    sampler = _linear(schedule, device)
    sampler.begin_at(step, sigma)
    return sampler


def _linear(schedule: Schedule, device: torch.device) -> LinearSampler:
    name, steps, timesteps = schedule.sampler, schedule.num_inference_steps, schedule.timesteps
    with NEW_TENSORS.at(torch.float32):
        scheduler = _scheduler(name, schedule.flow_shift if timesteps is None else 1.0)
        if timesteps is not None:  # only with Euler: the multistep solvers have no such argument
            scheduler.set_timesteps(sigmas=[t / 1000 for t in timesteps], timesteps=list(timesteps), device="cpu")
        elif name == "unipc-official":
            scheduler.set_timesteps(sigmas=official_sigmas(steps), device="cpu")
        else:
            scheduler.set_timesteps(steps, device="cpu")
    return LinearSampler(scheduler, device)


def official_sigmas(num_inference_steps: int) -> NDArray[np.float64]:
    """Return the official code's sigmas before each step, `[num_inference_steps]`, before the shift: from 0.999 towards
    0, which is excluded.

    Those of diffusers go from 1 towards 0.001. Source: Wan2.1 wan/utils/fm_solvers_unipc.py (`set_timesteps`; the
    largest of its 1000 training sigmas is 0.999, the smallest 0).
    """
    return np.linspace(0.999, 0.0, num_inference_steps + 1)[:-1]


def _scheduler(name: SamplerName, flow_shift: float) -> Any:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": flow_shift}
    if name in ("unipc", "unipc-official"):
        from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

        return UniPCMultistepScheduler(num_train_timesteps=1000, solver_order=2, solver_type="bh2", **flow)
    if name == "dpm++2m":
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler(num_train_timesteps=1000, algorithm_type="dpmsolver++", **flow)
    if name == "euler":
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=flow_shift)
    raise ValueError(f"There is no sampler {name!r}.")


def _to(value: Any, device: torch.device) -> Any:
    return _each(value, lambda x: x.detach().to(device, copy=True))


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return `value` with `change` applied to every tensor in it, in order."""
    if isinstance(value, list):
        return [_each(item, change) for item in value]
    return change(value) if isinstance(value, Tensor) else value


def _sum(shares: Tensor, given: Sequence[Tensor]) -> Tensor:
    """Return the sum of the tensors with weights `shares` `[1, n]`; the tensor itself if only one has a weight, of
    1."""
    terms = [(share, x) for share, x in zip(shares[0].tolist(), given, strict=True) if share != 0.0]
    if [share for share, _ in terms] == [1.0]:
        return terms[0][1]
    (share, first), *rest = terms
    total = first.float() * share
    for share, x in rest:
        total.add_(x, alpha=share)
    return total
