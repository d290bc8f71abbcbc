"""Low resolution first: the size of the first steps, the noise level that ends them, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest

from wanduet.errors import InvalidRequestError
from wanduet.family.distilled import FEW_STEP
from wanduet.family.low_res import FEWEST_PIXELS, last_low_level, low_size
from wanduet.family.wan21 import WAN_1_3B, WAN_14B
from wanduet.request import GenerationRequest

FIELDS = {"prompt": "x", "height": 720, "width": 1280, "low_res_first": True}
SMALL = replace(WAN_1_3B, defaults=replace(WAN_1_3B.defaults, height=96, width=96))
SMALL = replace(
    SMALL, transformer=replace(SMALL.transformer, num_layers=6, num_attention_heads=8, attention_head_dim=32)
)


@pytest.mark.parametrize(
    ("height", "width", "low"),
    [
        (720, 1280, (480, 848)),
        (1280, 720, (848, 480)),
        (704, 1280, (464, 848)),
        (1088, 1920, (544, 960)),  # half of it is enough
        (480, 832, None),
        (720, 720, None),
    ],
)
def test_the_smaller_size_is_one_that_the_model_makes(height: int, width: int, low: Any) -> None:
    assert low_size(height, width, WAN_1_3B) == low_size(height, width, WAN_14B) == low


def test_each_model_has_its_own_smallest_size() -> None:
    assert (SMALL.transformer.num_layers, SMALL.transformer.dim) in FEWEST_PIXELS
    assert [low_size(side, side, SMALL) for side in (64, 80, 96, 128)] == [None, None, (64, 64), (64, 64)]
    other = replace(SMALL, transformer=replace(SMALL.transformer, num_layers=7))  # its default size is its smallest
    assert [low_size(side, side, other) for side in (96, 128, 144)] == [None, None, (96, 96)]


@pytest.mark.parametrize(
    ("ratio", "side", "steps"),
    [(2.0, 60, {0.01: 23, 0.02: 27, 0.05: 33, 0.1: 37}), (1.5, 90, {0.005: 30, 0.01: 34, 0.02: 38})],
)
def test_the_noise_levels_are_those_of_the_paper(ratio: float, side: int, steps: dict[float, int]) -> None:
    """As SGLang's documentation has them: of 50 steps with a shift of 5, for half of 480p; and for 480p of 720p."""
    levels = [5 * (50 - i) / 50 / (1 + 4 * (50 - i) / 50) for i in range(50)]
    found = {share: sum(level > last_low_level(ratio, side, share) for level in levels) for share in steps}
    assert found == steps


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"height": 480, "width": 832}, "for a video of 832x480"),
        ({"input_video": "sha256:-", "strength": 0.5}, "with an input video"),
        ({"sampler": "renoise"}, "with the sampler renoise"),
        ({"sampler": "euler", "timesteps": (1000, 500)}, "with timesteps"),
        ({"step_cache": "easycache"}, "with a step cache"),
        ({"speed": "near"}, "with a step cache"),
        ({"sparse": 0.5}, "with sparse attention"),
        ({"num_inference_steps": 1}, "for a run of 1 step"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        GenerationRequest.parse(**(FIELDS | fields)).resolve(WAN_1_3B)
    assert (refused.value.field, refused.value.nearest) == ("low_res_first", False)
    assert reason in refused.value.allowed


def test_few_step_weights_are_refused() -> None:
    few = replace(WAN_14B, defaults=replace(WAN_14B.defaults, **FEW_STEP[0].defaults()))
    with pytest.raises(InvalidRequestError, match="few-step weights"):
        GenerationRequest.parse(**FIELDS).resolve(few)


def test_it_goes_with_a_guidance_gate_and_products_in_8_bits() -> None:
    request = GenerationRequest.parse(**FIELDS, guidance_gate=0.5, quantize="fp8").resolve(WAN_1_3B)
    assert request.low_res_first
    assert request.approximates
    assert request.recorded()["low_res_first"] is True
    exact = GenerationRequest.parse(**(FIELDS | {"low_res_first": False})).resolve(WAN_1_3B)
    assert not exact.approximates
    assert "low_res_first" not in exact.recorded()
