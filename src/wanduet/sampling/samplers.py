"""The solvers that turn noise into latents: diffusers' schedulers behind one small face.

A sampler can hand out its whole state and take it back, and then continues bit for bit. Latents and
solver arithmetic are float32. No step makes the host wait for the device.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from wanduet.request import SamplerName

State = dict[str, Any]  # tensors, numbers, lists of either, None
# What a multistep scheduler remembers between steps (names of diffusers' attributes).
_HISTORY = ("model_outputs", "timestep_list", "lower_order_nums", "last_sample", "this_order", "_step_index")


class Sampler(Protocol):
    """What the denoising loop needs."""

    timesteps: list[float]  # 1000 (noise) to 0, one a step, as the model takes them
    sigmas: list[float]  # share of noise before each step, and after the last

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        """The latents after step `index`, all float32."""

    def state(self) -> State:
        """What `restore` needs to continue after the steps made so far."""

    def restore(self, state: State) -> None:
        """Continue where the sampler that gave `state` was."""


class SchedulerSampler:
    """A diffusers scheduler as a `Sampler`. `scheduler` must have its timesteps set."""

    def __init__(self, scheduler: Any, device: torch.device) -> None:
        self._scheduler = scheduler
        self._device = device
        scheduler.set_begin_index(0)  # else every step searches its index, which waits for the device
        self._steps = list(scheduler.timesteps.cpu())
        self.timesteps = [float(t) for t in self._steps]
        self.sigmas = [float(s) for s in scheduler.sigmas]

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        """See Sampler."""
        out: Tensor = self._scheduler.step(velocity, self._steps[index], latents, return_dict=False)[0]
        return out

    def state(self) -> State:
        """See Sampler. Tensors are copied to the host."""
        return {name: _to(getattr(self._scheduler, name), torch.device("cpu")) for name in self._names()}

    def restore(self, state: State) -> None:
        """See Sampler."""
        for name, value in state.items():  # a fresh scheduler lacks some of these attributes
            setattr(self._scheduler, name, _to(value, self._device))

    def _names(self) -> list[str]:
        return [name for name in _HISTORY if hasattr(self._scheduler, name)]


def make_sampler(name: SamplerName, flow_shift: float, num_inference_steps: int, device: torch.device) -> Sampler:
    """A sampler with its schedule for a number of steps. `flow_shift` moves steps towards high noise."""
    scheduler = _scheduler(name, flow_shift)
    scheduler.set_timesteps(num_inference_steps, device="cpu")
    return SchedulerSampler(scheduler, device)


def _scheduler(name: SamplerName, flow_shift: float) -> Any:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": flow_shift}
    if name == "unipc":
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
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, list):
        return [_to(item, device) for item in value]
    return value
