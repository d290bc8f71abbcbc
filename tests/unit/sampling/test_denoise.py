import pytest
import torch

from wanduet.errors import CancelledError, NonFiniteLatentsError
from wanduet.kernels.attention.call import Step
from wanduet.sampling.denoise import denoise
from wanduet.sampling.guidance import Combination, NoGuidance, SequentialGuidance
from wanduet.sampling.noise import initial_noise
from wanduet.sampling.samplers import Schedule, make_sampler

CPU = torch.device("cpu")


def start() -> torch.Tensor:
    return initial_noise((1, 16, 1, 2, 2), 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 2, 4])
def test_non_finite_latents_are_named_at_their_step(bad: float, step: int) -> None:
    sampler = make_sampler(Schedule("euler", 3.0, 5), 0, CPU)
    seen = []

    def velocity(x, now):
        return x * bad if now == Step(step, sampler.timesteps[step]) else x

    with pytest.raises(NonFiniteLatentsError) as caught:
        denoise(velocity, start(), sampler, on_step=lambda info: seen.append(info.step))
    assert caught.value.step == step
    assert max(seen) <= step + 1


def test_cancel_is_between_steps() -> None:
    seen = []
    with pytest.raises(CancelledError):
        denoise(
            lambda x, t: x,
            start(),
            make_sampler(Schedule("unipc", 3.0, 9), 0, CPU),
            on_step=lambda info: seen.append(info.step),
            should_cancel=lambda: len(seen) == 3,
        )
    assert seen == [0, 1, 2]


def test_a_callback_may_replace_the_latents() -> None:
    end = denoise(
        lambda x, t: x * 0,
        start(),
        make_sampler(Schedule("euler", 3.0, 3), 0, CPU),
        on_step=lambda i: i.latents * 0 + i.step,
    )
    assert torch.equal(end, torch.full_like(end, 2.0))


def test_guidance_formula() -> None:
    predict = lambda x, t, conditions: [x * c + t.timestep for c in conditions]  # noqa: E731
    x = start()
    assert torch.equal(NoGuidance(predict, 2.0)(x, Step(0, 1.0)), x * 2 + 1)
    guided = SequentialGuidance(predict, 3.0, -1.0, Combination(5.0))(x, Step(0, 0.0))
    torch.testing.assert_close(guided, -x + 5 * (3 * x + x))


def test_apg_begins_anew_where_latents_are_enlarged() -> None:
    """Its sum of earlier differences has their size."""
    apg, small, large = Combination(5.0, "apg"), (1, 16, 2, 4, 4), (1, 16, 2, 8, 8)
    apg(torch.randn(small), torch.randn(small))
    both = torch.randn(large), torch.randn(large)
    assert torch.equal(apg(*both), Combination(5.0, "apg")(*both))
    assert not torch.equal(apg(*both), Combination(5.0, "apg")(*both))


def test_noise_depends_on_the_seed_alone() -> None:
    assert torch.equal(initial_noise((2, 3), 7), initial_noise((2, 3), 7))
    assert not torch.equal(initial_noise((2, 3), 7), initial_noise((2, 3), 8))
