"""Errors along the exact trajectory, from recorded velocities."""

from typing import Any

import pytest
import torch

from wanduet.family.wan21 import WAN_1_3B
from wanduet.kernels.attention.call import Step
from wanduet.price.replay import Replay, Trajectory
from wanduet.request import GenerationRequest, ResolvedRequest
from wanduet.sampling.denoise import StepInfo
from wanduet.sampling.predictor import OnPredict

STEPS = 14


def request(**fields: Any) -> ResolvedRequest:
    return GenerationRequest(prompt="x", seed=1, num_inference_steps=STEPS, guidance_scale=3.0, **fields).resolve(
        WAN_1_3B
    )


def test_the_gate_and_a_cache_along_an_exact_run() -> None:
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(STEPS, 3, 1, 2, 3, 4, 4, generator=generator).cumsum(0) / 20
    steps = torch.randn(3, 1, 2, 3, 4, 4, generator=generator) + change  # latents, and the velocities of both prompts
    replay = Replay(
        {
            "gate": request(guidance_gate=0.5),
            "cache": request(step_cache="easycache:1.0"),
            "interval": request(guidance_interval="0.5-1"),
        },
        WAN_1_3B,
        lambda: lambda t: t,
    )
    for count in (5, STEPS):  # the run begins again after five steps, as it does after NaN
        for index, (latents, *velocities) in enumerate(steps[:count]):
            replay(latents, Step(index, 1000.0 - index), velocities)
    errors = replay.errors()

    def error(index: int, guess: torch.Tensor) -> float:
        _, positive, negative = steps[index]
        exact = negative + 3 * (positive - negative)
        return float((guess - exact).norm() / exact.norm())

    def reused(index: int) -> torch.Tensor:
        """The guided velocity of step 9, the last that is computed, moved with the latents."""
        x, positive, negative = steps[9]
        return negative + 3 * (positive - negative) + steps[index][0] - x

    assert errors["gate"] == pytest.approx([0.0] * 7 + [error(index, steps[index][1]) for index in range(7, STEPS)])
    assert errors["interval"] == pytest.approx([error(index, steps[index][1]) for index in range(7)] + [0.0] * 7)
    computed = [0.0] * 10, [0.0]  # the first ten and the last
    assert errors["cache"] == pytest.approx(
        [*computed[0], *(error(index, reused(index)) for index in range(10, STEPS - 1)), *computed[1]], abs=1e-5
    )
    assert min(errors["cache"][10:-1]) > 0.01


@pytest.mark.parametrize(("mode", "first"), [("cfg", 0), ("apg", 0), ("cfg-zero", 1)])
def test_a_run_that_follows_an_exact_one_has_its_latents_and_an_error_in_each_step(mode: str, first: int) -> None:
    exact = request(guidance_mode=mode)
    steps = torch.randn(STEPS, 3, 1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    trajectory = Trajectory(exact)

    def run(observer: OnPredict, scale: float = 1.0) -> None:
        for count in (5, STEPS):  # it begins again after five steps
            for index in range(first, count):
                latents, *velocities = steps[index]
                observer(latents, Step(index, 1000.0 - index), [scale * velocity for velocity in velocities])

    run(trajectory)
    same, other = trajectory.follow(), trajectory.follow()
    run(same)
    assert same.errors == [0.0] * STEPS
    run(other, scale=1.1)
    assert len(other.errors) == STEPS
    assert other.errors[:first] == [0.0] * first
    if mode != "apg":  # which bounds guidance by its own norm
        assert other.errors[first:] == pytest.approx([0.1] * (STEPS - first), rel=1e-4)
    for index in range(first, STEPS - 1):
        info = StepInfo(index, STEPS, 1000.0 - index, 0.5, torch.zeros(1, 2, 3, 4, 4), 0.0)
        assert torch.equal(same.next_latents(info), steps[index + 1][0])
    assert same.next_latents(StepInfo(STEPS - 1, STEPS, 0.0, 0.0, torch.zeros(1), 0.0)) is None


@pytest.mark.parametrize(("mode", "first"), [("apg", 0), ("cfg-zero", 1)])
def test_errors_are_those_beside_an_exact_run_of_the_same_mode(mode: str, first: int) -> None:
    replay = Replay({"interval": request(guidance_mode=mode, guidance_interval="0-0.5")}, WAN_1_3B, lambda: lambda t: t)
    both = torch.randn(2, 1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # it begins again
        for index in range(first, STEPS):  # in the steps before, nothing is predicted
            replay(both[0], Step(index, 1000.0 - index), list(both))
    errors = replay.errors()["interval"]
    assert len(errors) == STEPS
    assert errors[:7] == [0.0] * 7
    assert min(errors[7:]) > 0.01
