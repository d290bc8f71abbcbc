"""Each mode of guidance against diffusers' guider, used as diffusers uses it."""

import math

import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance, ClassifierFreeZeroStarGuidance

from wanduet.family.wan21 import WAN_1_3B
from wanduet.kernels.attention.call import Step
from wanduet.request import GenerationRequest
from wanduet.sampling.guidance import Combination, SequentialGuidance

STEPS, SCALE = 50, 6.0
SHAPE = (2, 16, 3, 6, 8)
# The norm of at most 55 that is used with Wan2.1 at 480x832x81, for latents of this size.
LIMIT = 55 * math.sqrt(math.prod(SHAPE[1:]) / (16 * 21 * 60 * 104))


class Recorded:
    """Predicts velocities of both prompts that change from step to step."""

    def __init__(self, difference: float) -> None:
        draw = torch.Generator().manual_seed(4)
        self.positive, noise = (torch.randn(STEPS, *SHAPE, generator=draw) for _ in range(2))
        self.negative = self.positive + difference * noise

    def __call__(self, latents: torch.Tensor, step: Step, conditions: tuple[str, ...]) -> list[torch.Tensor]:
        return [getattr(self, name)[step.index] for name in conditions]


@pytest.mark.parametrize("difference", [0.02, 0.5])  # APG limits only the second
@pytest.mark.parametrize(
    ("fields", "guider"),
    [
        ({"guidance_interval": "0.1-0.8"}, ClassifierFreeGuidance(SCALE, start=0.1, stop=0.8)),
        ({"guidance_mode": "cfg-zero"}, ClassifierFreeZeroStarGuidance(SCALE, zero_init_steps=2)),
        (
            {"guidance_mode": "apg", "guidance_interval": "0.1-0.8"},
            AdaptiveProjectedGuidance(
                SCALE - 1, adaptive_projected_guidance_momentum=-0.75, adaptive_projected_guidance_rescale=LIMIT, eta=0.0,
                use_original_formulation=True, start=0.1, stop=0.8,
            ),
        ),
    ],
    ids=["interval", "cfg-zero", "apg"],
)  # fmt: skip
def test_velocities_are_those_of_diffusers(fields, guider, difference: float) -> None:
    request = GenerationRequest(prompt="x", guidance_scale=SCALE, num_inference_steps=STEPS, **fields).resolve(WAN_1_3B)
    predictor = Recorded(difference)
    ours = SequentialGuidance(
        predictor, "positive", "negative", Combination(SCALE, request.guidance_mode), request.guided_steps,
        request.num_zero_steps,
    )  # fmt: skip
    for index in range(STEPS):
        guider.set_state(index, STEPS, torch.tensor(500))
        both = predictor.positive[index], predictor.negative[index]
        guider.prepare_inputs({"noise_pred": both})  # begins the momentum
        expected = guider.forward(*both).pred
        got = ours(torch.ones(SHAPE), Step(index, 500.0))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
