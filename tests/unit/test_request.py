import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wanduet.errors import InvalidRequestError
from wanduet.family.specs import WAN_1_3B
from wanduet.request import GenerationRequest, ResolvedRequest, frames_for_seconds, parse_resolution

ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3)
FIELDS = st.dictionaries(st.sampled_from([*GenerationRequest.model_fields, "nonsense"]), ANYTHING, max_size=4)


def test_the_nearest_allowed_size_is_allowed() -> None:
    with pytest.raises(InvalidRequestError, match="at most 16384") as caught:
        GenerationRequest.parse(prompt="x", width=1_000_001).resolve(WAN_1_3B)
    GenerationRequest.parse(prompt="x", width=caught.value.nearest).resolve(WAN_1_3B)


@settings(max_examples=400, deadline=None)
@given(FIELDS)
def test_any_values_give_a_request_or_an_error_that_names_a_field(values: dict) -> None:
    problem = None
    try:
        request = GenerationRequest.parse(**({"prompt": "x"} | values)).resolve(WAN_1_3B)
    except InvalidRequestError as error:
        problem = error
    if problem is not None:
        assert problem.field in values
        assert problem.field in problem.message
        return
    assert isinstance(request, ResolvedRequest)
    assert request.as_request().resolve(WAN_1_3B) == request  # resolving again changes nothing
    assert (request.num_frames - 1) % 4 == 0
    assert request.generated_height % 16 == request.generated_width % 16 == 0
    assert 0 <= request.generated_height - request.height < 16


def test_defaults_are_the_models() -> None:
    request = GenerationRequest(prompt="x").resolve(WAN_1_3B)
    assert (request.height, request.width, request.num_frames, request.fps) == (480, 832, 81, 16)
    assert (request.num_inference_steps, request.guidance_scale, request.flow_shift) == (50, 6.0, 8.0)
    assert request.negative_prompt == WAN_1_3B.defaults.negative_prompt
    assert GenerationRequest(prompt="x", negative_prompt="").resolve(WAN_1_3B).negative_prompt == ""
    seeds = {GenerationRequest(prompt="x").resolve(WAN_1_3B).seed for _ in range(5)}
    assert len(seeds) == 5


def test_1080p_is_generated_larger_and_cropped() -> None:
    height, width = parse_resolution("1080p")
    request = GenerationRequest(prompt="x", height=height, width=width).resolve(WAN_1_3B)
    assert (request.height, request.width) == (1080, 1920)
    assert (request.generated_height, request.generated_width) == (1088, 1920)


@pytest.mark.parametrize(
    ("field", "value", "nearest"),
    [
        ("num_frames", 80, "81 or 77"), ("num_frames", 2, "5 or 1"), ("num_frames", 5000, 4093),
        ("height", 100, "96 or 112"), ("height", 16400, 16384), ("width", 15, 16),
        ("fps", 0, 1), ("fps", 500, 120), ("num_inference_steps", 2000, 1000), ("seed", -5, 0),
    ],
)  # fmt: skip
def test_the_nearest_allowed_value_is_told(field: str, value: int, nearest: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        GenerationRequest.parse(prompt="x", **{field: value}).resolve(WAN_1_3B)
    assert (caught.value.field, caught.value.given) == (field, value)
    assert str(caught.value.nearest) == str(nearest)
    assert f"{field}={value}" in str(caught.value)


@pytest.mark.parametrize("prompt", ["", " ", "\n\t", "\u2003"])
def test_an_empty_prompt(prompt: str) -> None:
    with pytest.raises(InvalidRequestError, match="not empty"):
        GenerationRequest.parse(prompt=prompt)


def test_a_field_that_is_none_lists_those_that_are() -> None:
    with pytest.raises(InvalidRequestError, match="num_inference_steps"):
        GenerationRequest.parse(prompt="x", steps=5)


@pytest.mark.parametrize(
    ("text", "size"), [("480p", (480, 832)), (" 720P ", (720, 1280)), ("1080p", (1080, 1920)), ("640X368", (368, 640))]
)
def test_resolutions(text: str, size: tuple[int, int]) -> None:
    assert parse_resolution(text) == size


@pytest.mark.parametrize("text", ["", "x", "480", "480x", "x480", "-5x5", "4.5x4", "1x2x3", "480i"])
def test_what_is_no_resolution(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="WIDTHxHEIGHT"):
        parse_resolution(text)


def test_seconds_to_frames() -> None:
    assert [frames_for_seconds(s) for s in (0.01, 1, 2, 5, 10)] == [1, 17, 33, 81, 161]
    assert frames_for_seconds(2, 24) == 49
