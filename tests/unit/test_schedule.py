"""Timesteps in a request: what is allowed, what follows from them, and what few-step weights have by default."""

import json
from dataclasses import replace
from typing import Any

import pytest

from wanduet.errors import InvalidRequestError
from wanduet.family.distilled import FEW_STEP_LORAS
from wanduet.family.registry import with_few_step_lora
from wanduet.family.spec import ModelSpec
from wanduet.family.wan21 import WAN_1_3B
from wanduet.request import GenerationRequest, ResolvedRequest
from wanduet.schedule import few_step_warnings, joined

LIST = (1000.0, 757.0, 522.0)
FEW_STEP = replace(
    WAN_1_3B,
    defaults=replace(
        WAN_1_3B.defaults, sampler="renoise", timesteps=LIST, num_inference_steps=3, guidance_scale=1.0, flow_shift=8.0
    ),
)


def resolved(spec: ModelSpec = WAN_1_3B, **fields: Any) -> ResolvedRequest:
    return GenerationRequest.parse(prompt="x", seed=1, **fields).resolve(spec)


@pytest.mark.parametrize("given", ["1000,757,522", " 1000, 757.0 ,522", "[1000, 757, 522]", [1000, 757, 522], LIST])
def test_a_list_and_its_text_mean_the_same(given: Any) -> None:
    request = resolved(timesteps=given, sampler="euler")
    assert request.timesteps == LIST
    assert request.num_inference_steps == request.num_denoising_steps == 3
    assert GenerationRequest.parse(prompt="x", timesteps=joined((2500 / 3, 0.1))).timesteps == (2500 / 3, 0.1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "a number"),
        ("1000,,522", "a number"),
        ("1000;757", "a number"),
        ("nan", "finite"),
        ([True], "a number"),
        ([], "from 1 to 1000"),
        ([*range(1000, 0, -1), 0.5], "from 1 to 1000"),
        ([1000, 0], "more than 0"),
        ([1000.5], "at most 1000"),
        ([757, 757], "less than the one before"),
        ([757, 1000], "less than the one before"),
        (1000, "a list of numbers"),
        ({"a": 1}, "a list of numbers"),
    ],
)
def test_what_is_no_list_of_timesteps(given: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as refused:
        resolved(timesteps=given, sampler="euler")
    assert refused.value.field == "timesteps"


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({}, "timesteps", "only with the sampler euler or renoise; unipc has"),
        ({"sampler": "dpm++2m"}, "timesteps", "only with the sampler euler or renoise"),
        ({"sampler": "euler", "flow_shift": 8.0}, "flow_shift", "leave it out"),
        ({"sampler": "euler", "num_inference_steps": 4}, "num_inference_steps", "there are 3 timesteps"),
    ],
)
def test_fields_that_exclude_timesteps(fields: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as refused:
        resolved(timesteps=LIST, **fields)
    assert refused.value.field == field


def test_the_number_of_timesteps_may_be_given_with_them() -> None:
    assert resolved(timesteps=LIST, sampler="renoise", num_inference_steps=3).num_inference_steps == 3


def test_an_input_video_keeps_the_last_of_the_timesteps() -> None:
    video = {"input_video": "sha256:0", "strength": 0.7}
    request = resolved(timesteps=LIST, sampler="renoise", **video)
    assert (request.num_inference_steps, request.num_denoising_steps) == (3, 2)
    assert request.uses_input


def test_records_have_either_timesteps_or_a_shift() -> None:
    request = resolved(timesteps=LIST, sampler="renoise")
    record = json.loads(json.dumps(request.recorded()))
    assert record["timesteps"] == [1000, 757, 522]
    assert "flow_shift" not in record
    assert (
        GenerationRequest.parse(**{k: record[k] for k in GenerationRequest.model_fields if k in record}).resolve(
            WAN_1_3B
        )
        == request
    )
    assert "timesteps" not in resolved().recorded()
    assert resolved().recorded()["flow_shift"] == 8.0


@pytest.mark.parametrize(
    "fields", [{}, {"num_inference_steps": 3}, {"sampler": "renoise"}, {"guidance_scale": 1.0}, {"timesteps": LIST}]
)
def test_few_step_weights_have_their_own_timesteps(fields: dict[str, Any]) -> None:
    request = resolved(FEW_STEP, **fields)
    assert (request.sampler, request.timesteps, request.num_inference_steps) == ("renoise", LIST, 3)
    assert request.as_request().resolve(FEW_STEP) == request


@pytest.mark.parametrize(
    ("fields", "schedule"),
    [
        ({"num_inference_steps": 8}, ("renoise", None, 8, 8.0)),
        ({"flow_shift": 8.0}, ("renoise", None, 3, 8.0)),
        ({"sampler": "unipc", "flow_shift": 3.0}, ("unipc", None, 3, 3.0)),
        ({"timesteps": "900,300"}, ("renoise", (900, 300), 2, 8.0)),
    ],
)
def test_another_schedule_replaces_them_with_a_warning(fields: dict[str, Any], schedule: tuple[Any, ...]) -> None:
    request = resolved(FEW_STEP, **fields)
    assert (request.sampler, request.timesteps, request.num_inference_steps, request.flow_shift) == schedule
    assert request.as_request().resolve(FEW_STEP) == request
    (warning,) = few_step_warnings(request.model_dump(), FEW_STEP.defaults)
    assert "sampler renoise at the timesteps 1000,757,522" in warning


def test_guidance_is_refused_with_few_step_weights_and_warned_of_with_a_few_step_lora() -> None:
    with pytest.raises(InvalidRequestError, match="distilled to run without guidance: leave it out") as refused:
        resolved(FEW_STEP, guidance_scale=5.0)
    assert (refused.value.field, refused.value.nearest) == ("guidance_scale", 1)
    lora = with_few_step_lora(WAN_1_3B, FEW_STEP_LORAS["lightx2v"])
    assert resolved(lora).guidance_scale == 1
    (warning,) = few_step_warnings(resolved(lora, guidance_scale=5.0).model_dump(), lora.defaults)
    assert "without guidance" in warning
    with pytest.raises(InvalidRequestError, match="without guidance"):
        resolved(with_few_step_lora(FEW_STEP, FEW_STEP_LORAS["lightx2v"]), guidance_scale=5.0)
    assert few_step_warnings(resolved(lora, num_inference_steps=20).model_dump(), lora.defaults) == []
    assert few_step_warnings(resolved(FEW_STEP).model_dump(), FEW_STEP.defaults) == []
    assert few_step_warnings(resolved(sampler="renoise").model_dump(), WAN_1_3B.defaults) == []
