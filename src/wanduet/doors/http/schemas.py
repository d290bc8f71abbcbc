"""Conversion between the API's JSON and the engine: a body to a `GenerationRequest`, a stored job to a video object."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from wanduet.doors.http.errors import ErrorDetail
from wanduet.doors.http.public import public_error, public_text
from wanduet.errors import InvalidRequestError
from wanduet.family.sizes import frames_for_seconds, parse_resolution
from wanduet.family.spec import ModelSpec
from wanduet.family.speeds import Prices, not_measured
from wanduet.jobs.records import StoredJob
from wanduet.loras import Lora
from wanduet.request import (
    MAX_PROMPT,
    REQUEST_FIELDS,
    GenerationRequest,
    check_prompt_length,
)
from wanduet.request_fields import RequestField, no_such_field
from wanduet.source_video import SourceVideo

MAX_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits of one request, below the model's own. Sizes in pixels, the prompt's in characters."""

    prompt: int = MAX_PROMPT
    pixels: int = 1920 * 1088
    frames: int = 401
    steps: int = 200
    videos: int = 4
    loras: int = 8
    lora_bytes: int = 4 * 2**30  # of their files together: they are in memory while a job runs

    def of(self, field: RequestField) -> int | None:
        """Return the maximum of a field; None means the model's own limit."""
        return None if field.shown.limit is None else getattr(self, field.shown.limit)


class _ProtocolFields(BaseModel):
    """The fields of a submission that are the protocol's own."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1)
    model: str | None = None
    seconds: str | float | None = Field(default=None, description="Length; becomes the nearest legal `num_frames`.")
    size: str | None = Field(default=None, description="`WIDTHxHEIGHT`, `480p`, `720p` or `1080p`.")
    input_reference: str | None = Field(default=None, description="Another name for `input_video`.")
    webhook_url: str | None = Field(
        default=None, description="Called when the video has completed or failed; on a host that this server allows."
    )
    n: int | str | None = Field(default=None, description="1: a request makes one video.")
    user: str | None = Field(default=None, description="Any text. It has no effect.")
    quality: str | None = Field(
        default=None, description="`auto`, `standard`, `high` or `hd`, which all mean the same."
    )
    extra_params: dict[str, Any] | str | None = Field(default=None, description="An empty object.")
    loras: list[dict[str, Any] | str] | str | None = Field(
        default=None,
        description="LoRA by their names in `GET /v1/loras`: objects with `name`, `strength` (-10 to 10, default 1), `start` and "
        "`end` (shares of the steps, default 0 and 1), or texts such as `style.safetensors:0.8`. In a form: JSON, or one "
        "such text, repeated for several.",
    )
    lora: dict[str, Any] | str | None = Field(default=None, description="One of `loras`; `scale` is its strength, too.")
    lora_name: str | None = Field(default=None, description="The name of one of `loras`.")
    lora_strength: float | str | None = Field(default=None, description="Beside `lora_name`.")
    lora_scale: float | str | None = Field(default=None, description="Another name for `lora_strength`.")


# The schema omits limits and choices: `to_request` checks them, and its errors name the nearest allowed value.
_SETTINGS: dict[str, Any] = {
    name: (
        list[float] | str | None if field.is_list else str | None if field.choices else field.kind | None,
        Field(default=None, description=f"{field.takes.capitalize()}. {field.help}"),
    )
    for name, field in REQUEST_FIELDS.items()
    if not field.is_required
}
CreateVideo = create_model(
    "CreateVideo",
    __base__=_ProtocolFields,
    __doc__="The body of a submission; `seconds` and `size` are the protocol's, the rest are the engine's settings.",
    **_SETTINGS,
)
# Fields that other servers' clients send by habit. Values that change nothing are taken; for others, what to use instead.
_NO_EFFECT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "n": (lambda value: value in (1, "1") and value is not True, "1; `num_videos_per_prompt` makes several"),
    "user": (lambda value: isinstance(value, str), "a text"),
    "quality": (
        lambda value: value in ("auto", "standard", "high", "hd"),
        "auto, standard, high or hd, which all mean the same; `speed` trades quality for time",
    ),
    "extra_params": (
        lambda value: value in ({}, "{}", ""),
        "an empty object; settings are fields of the body itself",
    ),
}
# Fields that take a file, by their names and the protocol's own name for one of them.
FILES = {name: name for name, field in REQUEST_FIELDS.items() if field.shown.is_file} | {
    "input_reference": "input_video"
}
NUMBERS = {name: field.takes for name, field in REQUEST_FIELDS.items() if field.is_number}
NUMBERS |= {"seconds": f"a number of seconds from 0 to {MAX_SECONDS:g}"}
_NUMBER = re.compile(r"[+-]?\d{1,40}(\.\d{0,40})?([eE][+-]?\d{1,4})?", re.ASCII)


class RemixVideo(BaseModel):
    """The body of a remix: the same settings and seed with another prompt."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1)


class Video(BaseModel):
    """A job as clients know it. Times are whole Unix seconds; `settings` is ours: every resolved field."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    seconds: str
    size: str
    prompt: str
    remixed_from_video_id: str | None
    error: ErrorDetail | None
    # Our extension, omitted unless it applies: why no worker takes a queued video.
    waits_for: str | None = Field(default=None, exclude_if=lambda value: value is None)
    # Our extension, omitted unless one was asked for, or a loss budget.
    speed: str | None = Field(default=None, exclude_if=lambda value: value is None)
    # Our extension, omitted unless the request named any: name, strength, SHA-256 and, if not all steps have it, their shares.
    loras: list[dict[str, Any]] | None = Field(default=None, exclude_if=lambda value: value is None)
    settings: dict[str, Any]


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    has_more: bool
    first_id: str | None
    last_id: str | None


class DeletedVideo(BaseModel):
    """What is left of a deleted video."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


def to_video(job: StoredJob, trouble: str | None = None) -> Video:
    """Convert a stored job to the API's video object. `trouble`: why no worker takes jobs now."""
    request = job.request
    waits_for = job.waits_for or (trouble if job.status == "queued" else None)
    error = None
    if job.error is not None:
        shown = public_error(job.error)
        error = ErrorDetail(message=shown.message, type=shown.type, param=shown.param, code=shown.code)
    return Video(
        id=job.id,
        model=public_text(job.model),
        status=job.status,
        progress=math.floor(job.progress),
        created_at=int(job.created_at),
        completed_at=_seconds(job.completed_at),
        expires_at=_seconds(job.expires_at),
        seconds=_length(request.get("num_frames"), request.get("fps")),
        size=f"{request['width']}x{request['height']}" if request.get("width") and request.get("height") else "",
        prompt=request.get("prompt", ""),
        remixed_from_video_id=job.remixed_from,
        error=error,
        waits_for=None if waits_for is None else public_text(waits_for),
        speed=request.get("speed"),
        loras=[Lora(**lora).recorded() for lora in request.get("loras") or ()] or None,
        settings={name: value for name, value in request.items() if name != "prompt"},
    )


def _length(num_frames: int | None, fps: int | None) -> str:
    """Return the length in seconds, the inverse of `frames_for_seconds`; empty for a job stored with open fields."""
    return f"{(num_frames - 1) / fps:g}" if num_frames and fps else ""


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)


def form_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of a form, in which files are binary parts."""
    schema = model.model_json_schema()
    for name in FILES.keys() & schema["properties"].keys():
        about = {key: value for key, value in schema["properties"][name].items() if key in ("title", "description")}
        schema["properties"][name] = {**about, "type": "string", "format": "binary"}
    return schema


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return the schema of a JSON body, which has no files."""
    schema = model.model_json_schema()
    schema["properties"] = {name: about for name, about in schema["properties"].items() if name not in FILES}
    return schema


def to_request(
    fields: dict[str, Any],
    spec: ModelSpec,
    limits: RequestLimits,
    look: Callable[[], SourceVideo] | None = None,
    prices: Prices = not_measured,
) -> GenerationRequest:
    """Convert a body (without `model`) to a request with every field resolved, including the seed.

    `look` reads an input video whose path is in the body; `prices`: what the speeds lose. Raises InvalidRequestError, which names the field.
    """
    values = {name: value for name, value in fields.items() if value is not None}
    check_names(values, CreateVideo)
    if "prompt" not in values:
        raise InvalidRequestError("prompt", None, "a text that is not empty")
    for name, (has_no_effect, allowed) in _NO_EFFECT.items():
        if name in values and not has_no_effect(given := values.pop(name)):
            raise InvalidRequestError(name, given, allowed)
    _check_texts(values, limits)
    values = {name: _number(name, value) if name in NUMBERS else value for name, value in values.items()}
    fps = GenerationRequest.parse(prompt="x", fps=values.get("fps")).fps or spec.defaults.fps
    _take_seconds(values, fps, spec)
    _take_size(values)
    try:
        parsed = GenerationRequest.parse(**values)
        request = parsed.resolve(spec, None if look is None else look(), prices)
    except InvalidRequestError as error:
        smaller = _beyond(values, limits).get(error.field)
        if smaller is None or (smaller.field == error.field and _is_at_least(smaller.nearest, error.nearest)):
            raise
        raise smaller from None
    for problem in _beyond(request.model_dump(), limits).values():
        raise problem
    return request.as_request()


def _beyond(values: Mapping[str, Any], limits: RequestLimits) -> dict[str, InvalidRequestError]:
    """Return an error for each number that exceeds this server's limits, by field."""
    found: dict[str, InvalidRequestError] = {}
    height, width = values.get("height"), values.get("width")
    pixels = height * width if isinstance(height, int) and isinstance(width, int) else None
    numbers = {name: limits.of(field) for name, field in REQUEST_FIELDS.items() if field.is_number}
    for name, limit in {"size": limits.pixels, **numbers}.items():
        given = pixels if name == "size" else values.get(name)
        if limit is not None and isinstance(given, int | float) and given > limit:
            unit = " pixels" if name == "size" else ""
            error = InvalidRequestError(name, given, f"this server takes at most {limit}{unit}", limit)
            found |= dict.fromkeys(("height", "width") if name == "size" else (name,), error)
    return found


def _is_at_least(limit: object, other: object) -> bool:
    return isinstance(limit, int) and isinstance(other, int) and limit >= other


def fingerprint(fields: dict[str, Any], remixed_from: str | None = None) -> str:
    """Return a digest of a body, before a seed is drawn; the same for a form as for JSON. Files count by their hashes."""
    plain = {
        name: ",".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in fields.items()
        if value is not None
    }
    text = json.dumps([plain, remixed_from], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_names(fields: dict[str, Any], known: type[BaseModel]) -> None:
    """Raise InvalidRequestError for an unknown field."""
    for name, value in fields.items():
        if name not in known.model_fields:
            raise InvalidRequestError(name, value, no_such_field(name, known.model_fields))


def _check_texts(values: dict[str, Any], limits: RequestLimits) -> None:
    for name in (name for name, field in REQUEST_FIELDS.items() if field.kind is str):
        text = values.get(name, "")
        if not isinstance(text, str):
            raise InvalidRequestError(name, text, "it must be a text")
        check_prompt_length(name, text, limits.prompt)
        if any("\ud800" <= character <= "\udfff" for character in text) or "\0" in text:
            raise InvalidRequestError(name, text, "a text of valid Unicode characters")


def _number(name: str, given: Any) -> Any:
    """Convert a form's text to a number, so that form and JSON mean the same; booleans are refused."""
    text = given.strip(" ") if isinstance(given, str) else None
    if isinstance(given, bool) or (text is not None and not _NUMBER.fullmatch(text)):
        raise InvalidRequestError(name, given, NUMBERS[name])
    if text is None:
        return given
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def _take_seconds(values: dict[str, Any], fps: int, spec: ModelSpec) -> None:
    """Replace `seconds` by `num_frames`."""
    given = values.pop("seconds", None)
    if given is None:
        return
    seconds = float(given) if isinstance(given, int | float) and abs(given) <= MAX_SECONDS else math.nan
    if not 0.0 <= seconds <= MAX_SECONDS:  # also refuses NaN
        raise InvalidRequestError("seconds", given, NUMBERS["seconds"])
    if "num_frames" in values:
        raise InvalidRequestError("seconds", given, "give seconds or num_frames, not both")
    values["num_frames"] = frames_for_seconds(seconds, fps, spec.vae.temporal_stride)


def _take_size(values: dict[str, Any]) -> None:
    """Replace `size` by `height` and `width`."""
    given = values.pop("size", None)
    if given is None:
        return
    if "height" in values or "width" in values:
        raise InvalidRequestError("size", given, "give size or height and width, not both")
    try:
        values["height"], values["width"] = parse_resolution(given if isinstance(given, str) else "")
    except (InvalidRequestError, ValueError):
        raise InvalidRequestError("size", given, "480p, 720p, 1080p or WIDTHxHEIGHT, for example 832x480") from None
