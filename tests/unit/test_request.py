from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wanduet.errors import InvalidRequestError
from wanduet.family.sizes import frames_for_seconds, parse_resolution
from wanduet.family.wan21 import WAN_1_3B
from wanduet.request import GenerationRequest, ResolvedRequest
from wanduet.source_video import SourceVideo

MEANT = st.sampled_from([0.5, 1, 16, 20, 38, 480, 832, "exact", "fine", "draft", "fp8", "magcache:0.1", "euler", True])
ANYTHING = MEANT | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3)
CLIP = SourceVideo("ab" * 32, 1080, 1920, 10.0)
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
        request = GenerationRequest.parse(**({"prompt": "x"} | values)).resolve(WAN_1_3B, CLIP)
    except InvalidRequestError as error:
        problem = error
    if problem is not None:
        assert problem.field in values
        assert problem.field in problem.message
        return
    assert isinstance(request, ResolvedRequest)
    # Changes nothing, but names an input video by its hash, and in place of a loss budget the speed that keeps it.
    again = request.as_request().resolve(WAN_1_3B)
    assert again == request.model_copy(update={"input_video": again.input_video, "loss_budget": None})
    assert again.recorded() == request.recorded()
    assert (request.num_frames - 1) % 4 == 0
    assert request.generated_height % 16 == request.generated_width % 16 == 0
    assert 0 <= request.generated_height - request.height < 16


def test_a_side_that_follows_from_the_input_video_is_refused_by_what_it_follows_from() -> None:
    clip = SourceVideo("ab" * 32, 1920, 1080, 10.0)  # a portrait
    with pytest.raises(InvalidRequestError, match=r"height would be 21\d+ in the input video's proportions") as caught:
        GenerationRequest.parse(prompt="x", input_video="0", width=12000).resolve(WAN_1_3B, clip)
    assert caught.value.field == "width"
    nearest = GenerationRequest.parse(prompt="x", input_video="0", width=caught.value.nearest).resolve(WAN_1_3B, clip)
    assert 16300 < nearest.height <= 16384
    with pytest.raises(InvalidRequestError, match="width would be") as caught:
        GenerationRequest.parse(prompt="x", input_video="0").resolve(WAN_1_3B, SourceVideo("ab" * 32, 1, 10000, 10.0))
    assert caught.value.field == "input_video"
    both = {"width": 29142}  # too large, and so is the height that follows
    with pytest.raises(InvalidRequestError, match="width=29142") as caught:
        GenerationRequest.parse(prompt="x", input_video="0", **both).resolve(WAN_1_3B, CLIP)


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


def test_a_resolution_without_its_p_is_nearest_to_the_one_with_it() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_resolution("720")
    assert caught.value.nearest == "720p"


def test_seconds_to_frames() -> None:
    assert [frames_for_seconds(s) for s in (0.01, 1, 2, 5, 10)] == [1, 17, 33, 81, 161]
    assert frames_for_seconds(2, 24) == 49


def from_clip(source: SourceVideo = CLIP, **fields: Any) -> ResolvedRequest:
    return GenerationRequest.parse(prompt="x", input_video="a/clip.mp4", **fields).resolve(WAN_1_3B, source)


@pytest.mark.parametrize(
    ("clip", "size"),
    [
        ((1080, 1920), (480, 832)), ((1920, 1080), (832, 480)), ((300, 300), (624, 624)), ((16, 256), (160, 2496)),
        ((480, 640), (544, 736)), ((640, 480), (736, 544)),
    ],
)  # fmt: skip
def test_the_size_follows_the_input_video(clip: tuple[int, int], size: tuple[int, int]) -> None:
    """As many pixels as the model's default size has, in the clip's proportions."""
    request = from_clip(SourceVideo("00" * 32, *clip, 10.0))
    assert (request.height, request.width) == size
    assert request.height * request.width == pytest.approx(480 * 832, rel=0.05)
    assert request.height / request.width == pytest.approx(clip[0] / clip[1], rel=0.06)


def test_a_size_that_is_given_in_part_is_completed_in_the_clip_s_proportions() -> None:
    portrait = SourceVideo("00" * 32, 1920, 1080, 10.0)
    assert from_clip(portrait, height=960).width == 544
    assert from_clip(portrait, width=640).height == 1136
    assert (from_clip(portrait, width=640, height=480).generated_height) == 480
    assert GenerationRequest(prompt="x", height=640).resolve(WAN_1_3B).width == 832


@pytest.mark.parametrize(
    ("seconds", "fps", "frames"),
    [(10.0, None, 81), (2.0, None, 29), (1.0, None, 13), (1.0, 24, 21), (0.0, None, 1), (0.3, 16, 5), (81 / 16, 16, 81), (7.0, 7, 49)],
)  # fmt: skip
def test_the_number_of_frames_is_at_most_the_input_video_s(seconds: float, fps: int | None, frames: int) -> None:
    clip = SourceVideo("00" * 32, 480, 832, seconds)
    assert from_clip(clip, fps=fps).num_frames == frames
    assert from_clip(clip, fps=fps, num_frames=frames).num_frames == frames


@pytest.mark.parametrize("given", [30, 32, 33, 81])
def test_more_frames_than_the_input_video_has_are_refused(given: int) -> None:
    clip = SourceVideo("00" * 32, 480, 832, 2.0)
    with pytest.raises(InvalidRequestError, match="as the input video has 32") as caught:
        from_clip(clip, num_frames=given)
    assert (caught.value.field, caught.value.nearest) == ("num_frames", 29)
    from_clip(clip, num_frames=caught.value.nearest)


def test_strength_is_for_an_input_video() -> None:
    with pytest.raises(InvalidRequestError, match="only together with input_video") as caught:
        GenerationRequest.parse(prompt="x", strength=0.5).resolve(WAN_1_3B)
    assert caught.value.field == "strength"
    assert from_clip().strength == 0.8
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(InvalidRequestError, match="strength"):
            from_clip(strength=wrong)


@pytest.mark.parametrize(
    ("steps", "strength", "kept", "uses"),
    [
        (50, 0.8, 40, True),
        (50, 1.0, 50, False),
        (50, 0.0, 0, True),
        (3, 0.5, 1, True),
        (10, 0.99, 9, True),
        (1, 0.5, 0, True),
    ],
)
def test_steps_of_a_strength(steps: int, strength: float, kept: int, uses: bool) -> None:
    request = from_clip(num_inference_steps=steps, strength=strength)
    assert (request.num_denoising_steps, request.uses_input) == (kept, uses)
    without = GenerationRequest(prompt="x", num_inference_steps=steps).resolve(WAN_1_3B)
    assert (without.num_denoising_steps, without.uses_input) == (steps, False)


def test_records_name_an_input_video_by_its_hash() -> None:
    request = from_clip(seed=1)
    assert request.recorded()["input_video"] == "sha256:" + "ab" * 32
    assert request.recorded()["strength"] == 0.8
    assert "clip.mp4" not in repr(request.recorded())
    assert (
        not {"input_video", "strength", "input_sha256"}
        & GenerationRequest(prompt="x").resolve(WAN_1_3B).recorded().keys()
    )
    again = request.as_request().resolve(WAN_1_3B)  # without the file
    assert again.input_sha256 == request.input_sha256 == "ab" * 32
    assert again.recorded() == request.recorded()
    assert again.as_request() == request.as_request()


def test_a_path_needs_its_video() -> None:
    with pytest.raises(ValueError, match="has not been read"):
        GenerationRequest(prompt="x", input_video="a.mp4").resolve(WAN_1_3B)
