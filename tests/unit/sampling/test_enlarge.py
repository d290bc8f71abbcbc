"""Enlarging latents, and the sampler that does it: against the formulas, and from every state."""

import math

import pytest
import torch
from torch import Tensor

from wanduet.sampling.enlarge import Enlargement, EnlargingSampler, enlarge, shrink
from wanduet.sampling.noise import initial_noise
from wanduet.sampling.samplers import Schedule, make_sampler
from wanduet.schedule import SamplerName

CPU = torch.device("cpu")
SHIFT, STEPS, SEED = 5.0, 6, 7
ENLARGEMENT = Enlargement(3, (4, 6), (6, 10))
MULTISTEP: tuple[SamplerName, ...] = ("unipc", "unipc-official", "dpm++2m")
SOLVERS: tuple[SamplerName, ...] = (*MULTISTEP, "euler")


def coefficient(x: Tensor, row: int, column: int) -> float:
    """One coefficient of the orthonormal DCT-II of a picture `[h, w]`, by its sum."""
    (rows, columns), total = x.shape, 0.0
    for m in range(rows):
        for n in range(columns):
            wave = math.cos(math.pi * (2 * m + 1) * row / (2 * rows))
            total += float(x[m, n]) * wave * math.cos(math.pi * (2 * n + 1) * column / (2 * columns))
    for frequency, size in ((row, rows), (column, columns)):
        total *= math.sqrt((1 if frequency == 0 else 2) / size)
    return total


def test_low_frequencies_are_kept_and_the_others_are_noise() -> None:
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 5, 7, generator=generator)
    latents, noise, result = latents[1], noise[1], enlarge(latents, noise, 0.25)[1]
    for row in range(5):
        for column in range(7):
            is_kept = row < 3 and column < 4
            expected = coefficient(latents, row, column) if is_kept else 0.25 * coefficient(noise, row, column)
            assert coefficient(result, row, column) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("small", "large"), [((15, 26), (30, 52)), ((60, 106), (90, 160))])
def test_picture_and_noise_have_the_weights_of_the_new_level(small: tuple[int, int], large: tuple[int, int]) -> None:
    one = Enlargement(1, small, large)
    sigma, colour = 0.8, 3.0
    level = one.gain(sigma) * sigma
    if one.ratio == 2.0:
        assert level == pytest.approx(2 * sigma / (1 + sigma))
    picture = enlarge(torch.full((1, *small), (1 - sigma) * colour), torch.zeros(1, *large), sigma) * one.gain(sigma)
    assert torch.allclose(picture, torch.full((1, *large), (1 - level) * colour))
    generator = torch.Generator().manual_seed(2)
    noises = (torch.randn(64, *size, generator=generator) for size in (small, large))
    noise = enlarge(next(noises) * sigma, next(noises), sigma) * one.gain(sigma)
    assert noise.std().item() == pytest.approx(level, rel=0.01)


def test_the_noise_of_the_whole_video_comes_back() -> None:
    noise = torch.randn(8, 60, 100, generator=torch.Generator().manual_seed(5))
    small = shrink(noise, (40, 64))
    assert (small.mean().item(), small.std().item()) == pytest.approx((0.0, 1.0), abs=0.02)
    assert coefficient(small[0], 3, 2) == pytest.approx(coefficient(noise[0], 3, 2), abs=1e-4)
    assert torch.allclose(enlarge(small * 0.5, noise, 0.5), noise * 0.5, atol=1e-6)


def sampler_of(name: SamplerName) -> EnlargingSampler:
    return EnlargingSampler(Schedule(name, SHIFT, STEPS), SEED, CPU, ENLARGEMENT)


def begin() -> Tensor:
    return torch.randn(1, 2, 3, *ENLARGEMENT.small, generator=torch.Generator().manual_seed(3))


def velocity(latents: Tensor, timestep: float) -> Tensor:
    return torch.sin(latents * 1.3) + latents * timestep / 1000


@pytest.mark.parametrize("name", SOLVERS)
def test_first_steps_are_those_of_the_small_video(name: SamplerName) -> None:
    ours, plain = sampler_of(name), make_sampler(Schedule(name, SHIFT, STEPS), SEED, CPU)
    latents = expected = begin()
    for index in range(ENLARGEMENT.num_steps):
        assert ours.timesteps[index] == plain.timesteps[index]
        latents = ours.step(velocity(latents, ours.timesteps[index]), index, latents)
        expected = plain.step(velocity(expected, plain.timesteps[index]), index, expected)
        assert torch.equal(latents, expected) == (index + 1 < ENLARGEMENT.num_steps)
    sigma = plain.sigmas[ENLARGEMENT.num_steps]
    noise = initial_noise((1, 2, 3, *ENLARGEMENT.large), SEED)
    assert torch.equal(latents, enlarge(expected, noise, sigma) * ENLARGEMENT.gain(sigma))


@pytest.mark.parametrize("name", SOLVERS)
def test_the_solver_starts_anew_at_the_higher_level(name: SamplerName) -> None:
    """The first step of each solver is an Euler step; so are all of Euler's. The last one ends without noise."""
    ours, plain = sampler_of(name), make_sampler(Schedule(name, SHIFT, STEPS), SEED, CPU)
    first = ENLARGEMENT.num_steps
    latents = begin()
    for index in range(first):
        latents = ours.step(velocity(latents, ours.timesteps[index]), index, latents)
    raised = ENLARGEMENT.gain(plain.sigmas[first]) * plain.sigmas[first]
    assert plain.sigmas[first] < ours.sigmas[first] == pytest.approx(raised)
    assert abs(ours.timesteps[first] - 1000 * raised) < 1  # some solvers have whole timesteps
    assert ours.sigmas[first + 1 :] == plain.sigmas[first + 1 :]
    for index in range(first, STEPS):
        v = velocity(latents, ours.timesteps[index])
        expected = latents + (ours.sigmas[index + 1] - ours.sigmas[index]) * v
        latents = ours.step(v, index, latents)
        if index == first or name == "euler":
            assert torch.allclose(latents, expected, atol=1e-5)
    assert ours.sigmas[-1] == 0.0


@pytest.mark.parametrize("name", MULTISTEP)
def test_steps_after_the_first_use_the_new_history(name: SamplerName) -> None:
    """A velocity that does not change along a straight line is followed exactly, whatever the order."""
    ours = sampler_of(name)
    latents = begin()
    for index in range(ENLARGEMENT.num_steps):
        latents = ours.step(torch.zeros_like(latents), index, latents)
    v = torch.randn(latents.shape, generator=torch.Generator().manual_seed(4))
    start, level = latents, ours.sigmas[ENLARGEMENT.num_steps]
    for index in range(ENLARGEMENT.num_steps, STEPS):
        latents = ours.step(v, index, latents)
        assert torch.allclose(latents, start + (ours.sigmas[index + 1] - level) * v, atol=1e-4)


@pytest.mark.parametrize("name", SOLVERS)
def test_it_goes_on_bit_for_bit_from_every_state(name: SamplerName) -> None:
    def run(sampler: EnlargingSampler, latents: Tensor, start: int) -> list[Tensor]:
        found = [latents]
        for index in range(start, STEPS):
            states.append(sampler.state())
            found.append(sampler.step(velocity(found[-1], sampler.timesteps[index]), index, found[-1]))
        return found

    states: list[dict] = []
    whole = run(sampler_of(name), begin(), 0)
    saved = list(states)
    for start in range(STEPS):
        again = sampler_of(name)
        again.restore(saved[start])
        assert torch.equal(run(again, whole[start], start)[-1], whole[-1])


def test_it_begins_among_the_small_steps_only() -> None:
    sampler = sampler_of("euler")
    sampler.begin_at(0)
    with pytest.raises(ValueError, match="not on small latents"):
        sampler.begin_at(ENLARGEMENT.num_steps)
