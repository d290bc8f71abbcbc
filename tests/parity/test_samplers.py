"""Each sampler against diffusers' own scheduler used as diffusers uses it."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from wanduet.kernels.attention.call import Step
from wanduet.media.files import atomic_output
from wanduet.sampling.checkpoint import Checkpoints, DenoiseCheckpoint
from wanduet.sampling.denoise import denoise
from wanduet.sampling.samplers import Schedule, SchedulerSampler, make_sampler

CPU = torch.device("cpu")
NAMES = ("unipc", "dpm++2m", "euler")


def reference(name: str, shift: float):
    flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    if name == "unipc":
        return UniPCMultistepScheduler(**flow)
    return DPMSolverMultistepScheduler(**flow) if name == "dpm++2m" else FlowMatchEulerDiscreteScheduler(shift=shift)


def official(shift: float, steps: int) -> tuple[list[float], list[int]]:
    """Sigmas before each step and timesteps, by the official code's formula: 0.999 to 0, shifted, cut to whole numbers."""
    sigmas = [0.999 * (1 - step / steps) for step in range(steps)]
    shifted = [shift * sigma / (1 + (shift - 1) * sigma) for sigma in sigmas]
    return shifted, [int(1000 * sigma) for sigma in shifted]


def velocity(x: torch.Tensor, step: Step) -> torch.Tensor:
    return torch.sin(3 * x) * 0.7 + x * (step.timestep / 1000) - 0.2


def noise() -> torch.Tensor:
    return torch.randn(1, 16, 3, 4, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 8, 50])
@pytest.mark.parametrize("shift", [3.0, 8.0])
def test_equals_diffusers(name: str, steps: int, shift: float) -> None:
    scheduler = reference(name, shift)
    scheduler.set_timesteps(steps)
    expected = noise()
    for t in scheduler.timesteps:
        expected = scheduler.step(velocity(expected, Step(0, float(t))), t, expected, return_dict=False)[0]
    sampler = make_sampler(Schedule(name, shift, steps), 0, CPU)
    assert len(sampler.timesteps) == steps
    assert sampler.sigmas[-1] == 0.0
    got = denoise(velocity, noise(), sampler)
    assert (got - expected).abs().max() <= 5e-6 * expected.abs().max()  # the same sums, added up in another order


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
def test_unipc_official_has_the_grid_of_the_official_code(steps: int, shift: float) -> None:
    sampler = make_sampler(Schedule("unipc-official", shift, steps), 0, CPU)
    sigmas, timesteps = official(shift, steps)
    assert sampler.sigmas == pytest.approx([*sigmas, 0.0], abs=1e-6)
    # A product like 857.9999 and one like 858.0001 are cut to two numbers; float64 and float32 may differ there.
    assert all(abs(got - expected) <= 1 for got, expected in zip(sampler.timesteps, timesteps, strict=True))
    assert sum(got != expected for got, expected in zip(sampler.timesteps, timesteps, strict=True)) <= steps // 10


def test_the_two_grids_of_unipc_differ() -> None:
    ours, official_grid = (make_sampler(Schedule(name, 8.0, 50), 0, CPU) for name in ("unipc", "unipc-official"))
    differences = [a - b for a, b in zip(ours.timesteps, official_grid.timesteps, strict=True)]
    assert 1 <= max(map(abs, differences)) <= 10


def test_unipc_official_solves_as_unipc_does_on_its_own_grid() -> None:
    scheduler = reference("unipc", 5.0)
    scheduler.set_timesteps(sigmas=torch.linspace(0.999, 0.0, 9, dtype=torch.float64)[:-1].numpy())
    expected = noise()
    for t in scheduler.timesteps:
        expected = scheduler.step(velocity(expected, Step(0, float(t))), t, expected, return_dict=False)[0]
    got = denoise(velocity, noise(), make_sampler(Schedule("unipc-official", 5.0, 8), 0, CPU))
    assert (got - expected).abs().max() <= 5e-6 * expected.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_any_scheduler_steps_as_it_does_itself(name: str) -> None:
    scheduler, own = reference(name, 3.0), reference(name, 3.0)
    expected = noise()
    for each in (scheduler, own):
        each.set_timesteps(8)
    for t in scheduler.timesteps:
        expected = scheduler.step(velocity(expected, Step(0, float(t))), t, expected, return_dict=False)[0]
    assert torch.equal(denoise(velocity, noise(), SchedulerSampler(own, CPU)), expected)


@pytest.mark.parametrize("name", NAMES)
def test_restored_at_every_step_continues_bit_for_bit(name: str, tmp_path) -> None:
    steps = 7
    expected = denoise(velocity, noise(), make_sampler(Schedule(name, 5.0, steps), 0, CPU))
    sampler = make_sampler(Schedule(name, 5.0, steps), 0, CPU)
    store = Checkpoints(tmp_path, "job", atomic_output)

    def save(info) -> None:
        store.save(DenoiseCheckpoint(info.step + 1, info.latents, sampler.state(), {"prompt": "x"}))
        resumed = make_sampler(Schedule(name, 5.0, steps), 0, CPU)
        saved = store.load()
        assert saved is not None
        resumed.restore(saved.sampler_state)
        assert torch.equal(denoise(velocity, saved.latents, resumed, start_step=saved.step), expected)

    assert torch.equal(denoise(velocity, noise(), sampler, on_step=save), expected)
