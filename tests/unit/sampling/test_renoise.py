"""The samplers on a list of timesteps, against plain loops."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from wanduet.kernels.attention.call import Step
from wanduet.sampling.denoise import denoise
from wanduet.sampling.noise import initial_noise, step_noise
from wanduet.sampling.samplers import Sampler, Schedule, make_sampler
from wanduet.schedule import SamplerName

CPU = torch.device("cpu")
SHAPE = (1, 16, 2, 3, 4)
FASTWAN = (1000.0, 757.0, 522.0)
RCM = (987.65, 933.78, 852.89, 608.98)
SEED = 7


def velocity(x: Tensor, step: Step) -> Tensor:
    weights = torch.randn(SHAPE, generator=torch.Generator().manual_seed(round(step.timestep)))
    return torch.sin(2 * x) * weights - 0.3


def sampler(name: SamplerName, timesteps: Sequence[float], seed: int = SEED) -> Sampler:
    return make_sampler(Schedule(name, 8.0, len(timesteps), tuple(timesteps)), seed, CPU)


def renoised(x: Tensor, timesteps: Sequence[float]) -> Tensor:
    """DMD's and rCM's loop as their papers have it."""
    for index, timestep in enumerate(timesteps):
        video = x - timestep / 1000 * velocity(x, Step(index, timestep))
        if index + 1 == len(timesteps):
            return video
        after = timesteps[index + 1] / 1000
        x = (1 - after) * video + after * step_noise(SHAPE, SEED, index)
    raise AssertionError


def euler(x: Tensor, timesteps: Sequence[float]) -> Tensor:
    for index, (now, after) in enumerate(zip(timesteps, [*timesteps[1:], 0.0], strict=True)):
        x = x + (after - now) / 1000 * velocity(x, Step(index, now))
    return x


@pytest.mark.parametrize("timesteps", [FASTWAN, RCM, (1000.0,), (640.0, 0.5)], ids=str)
@pytest.mark.parametrize("name", ["renoise", "euler"])
def test_equals_the_plain_loop(name: SamplerName, timesteps: Sequence[float]) -> None:
    solver = sampler(name, timesteps)
    assert solver.timesteps == pytest.approx(timesteps)
    assert solver.sigmas == pytest.approx([*(t / 1000 for t in timesteps), 0.0])
    start = initial_noise(SHAPE, SEED)
    expected = {"renoise": renoised, "euler": euler}[name](start, solver.timesteps)
    torch.testing.assert_close(denoise(velocity, start, solver), expected)


@pytest.mark.parametrize("name", ["renoise", "euler"])
def test_the_steps_after_a_stop_are_those_of_the_whole_bit_for_bit(name: SamplerName) -> None:
    after: list[Tensor] = []
    whole = denoise(velocity, initial_noise(SHAPE, SEED), sampler(name, RCM), on_step=lambda i: after.append(i.latents))
    for step in (1, 2, 3):
        resumed = sampler(name, RCM)
        resumed.begin_at(step)
        assert torch.equal(denoise(velocity, after[step - 1], resumed, start_step=step), whole)


def test_no_noise_is_used_twice() -> None:
    videos = [[initial_noise(SHAPE, seed), *(step_noise(SHAPE, seed, step) for step in range(3))] for seed in (7, 8)]
    drawn = [noise for video in videos for noise in video]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert torch.equal(step_noise(SHAPE, 7, 1), drawn[2])
    assert abs(float(step_noise((64, 64, 16), 7, 1).std()) - 1) < 0.02


def test_rcm_begins_with_scaled_noise_and_diffusers_solvers_do_not() -> None:
    assert sampler("renoise", RCM).init_noise_sigma == pytest.approx(RCM[0] / 1000)
    assert sampler("renoise", FASTWAN).init_noise_sigma == 1.0
    assert sampler("euler", RCM).init_noise_sigma == 1.0


def test_without_a_list_the_steps_are_even_and_shifted() -> None:
    steps = make_sampler(Schedule("renoise", 5.0, 4), 0, CPU).timesteps
    assert steps == pytest.approx([1000, 937.5, 833.3333, 625])  # Self-Forcing's and LightX2V's
    assert make_sampler(Schedule("renoise", 0.3, 3), 0, CPU).sigmas[0] == 1.0
