"""What a user may ask: one frozen schema that feeds every door (command line, Python, HTTP, page).

Fields left at None take the model's defaults in `GenerationRequest.resolve`. Bad values are
refused here, before any model is loaded, with the nearest allowed value.
"""

import random
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticKnownError

from wanduet.errors import InvalidRequestError
from wanduet.family.specs import ModelSpec

SamplerName = Literal["unipc", "unipc-official", "dpm++2m", "euler"]
SAMPLERS: dict[SamplerName, str] = {
    "unipc": "UniPC of order 2 with diffusers' noise levels (1 to 0.001 before the shift)",
    "unipc-official": "the same with the official code's noise levels (0.999 to 0 before the shift)",
    "dpm++2m": "DPM-Solver++ of order 2, multistep",
    "euler": "Euler steps",
}

# (height, width); 1080p is generated as 1088 rows and cropped.
RESOLUTIONS = {"480p": (480, 832), "720p": (720, 1280), "1080p": (1080, 1920)}
CROPPED_SIDE = 1080
MAX_SEED = 2**63 - 1
MAX_PROMPT = 8000  # characters of what is typed or sent; the text encoder reads 512 tokens


def _refuse_bool(kind: Literal["int_type", "float_type"]) -> BeforeValidator:
    """Python counts True as 1; nobody who sends `true` means a seed of 1."""

    def check(value: Any) -> Any:
        if isinstance(value, bool):
            raise PydanticKnownError(kind)
        return value

    return BeforeValidator(check)


Whole = Annotated[int, _refuse_bool("int_type")]
Real = Annotated[float, Field(allow_inf_nan=False), _refuse_bool("float_type")]


class GenerationRequest(BaseModel):
    """One prompt and how to make a video of it. Sizes in pixels of the video that comes out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = Field(min_length=1)
    negative_prompt: str | None = None  # None: the model's default; "": empty
    height: Whole | None = Field(default=None, ge=16)
    width: Whole | None = Field(default=None, ge=16)
    num_frames: Whole | None = Field(default=None, ge=1)
    fps: Whole | None = Field(default=None, ge=1, le=120)
    num_inference_steps: Whole | None = Field(default=None, ge=1, le=1000)
    guidance_scale: Real | None = Field(default=None, ge=0.0, le=100.0)
    flow_shift: Real | None = Field(default=None, gt=0.0, le=100.0)
    seed: Whole | None = Field(default=None, ge=0, le=MAX_SEED)
    sampler: SamplerName = "unipc"
    num_videos_per_prompt: Whole = Field(default=1, ge=1, le=64)

    @classmethod
    def parse(cls, **values: Any) -> Self:
        """Build a request; raises InvalidRequestError instead of pydantic's ValidationError."""
        try:
            request = cls(**values)
        except ValidationError as error:
            raise _explain(error) from None
        if not request.prompt.strip():
            raise InvalidRequestError("prompt", request.prompt, "a text that is not empty")
        return request

    def resolve(self, spec: ModelSpec) -> "ResolvedRequest":
        """Fill every field from the model's defaults and check it against the model's shapes."""
        values = self.model_dump()
        for name, value in values.items():
            if value is None and hasattr(spec.defaults, name):
                values[name] = getattr(spec.defaults, name)
        if values["seed"] is None:
            values["seed"] = random.SystemRandom().randrange(2**32)
        for side in ("height", "width"):
            values[f"generated_{side}"] = _generated_side(side, values[side], spec)
        _check_frames(values["num_frames"], spec)
        return ResolvedRequest(**values)


class ResolvedRequest(GenerationRequest):
    """A request with every field decided; what the engine runs and what the MP4's metadata keeps."""

    negative_prompt: str
    height: int
    width: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    seed: int
    generated_height: int  # what the model makes; rows beyond `height` are cropped
    generated_width: int

    @property
    def uses_guidance(self) -> bool:
        """Whether each step needs the negative prompt's branch too."""
        return self.guidance_scale > 1.0

    @property
    def seconds(self) -> float:
        """Length of the video."""
        return self.num_frames / self.fps

    def as_request(self) -> GenerationRequest:
        """The same as a request that a user could have typed: resolving it again changes nothing."""
        names = GenerationRequest.model_fields
        return GenerationRequest(**{k: v for k, v in self.model_dump().items() if k in names})


def check_prompt_length(name: str, text: str, most: int = MAX_PROMPT) -> None:
    """Raises InvalidRequestError for a prompt (field `name`) of more than `most` characters."""
    if len(text) > most:
        raise InvalidRequestError(name, f"{len(text)} characters", f"at most {most} characters")


def parse_resolution(text: str) -> tuple[int, int]:
    """`480p`, `720p`, `1080p` or `WIDTHxHEIGHT` to `(height, width)`."""
    name = text.strip().lower()
    if name in RESOLUTIONS:
        return RESOLUTIONS[name]
    width, _, height = name.partition("x")
    if all(side.isascii() and side.isdecimal() and len(side) < 6 for side in (width, height)):
        return int(height), int(width)
    allowed = ", ".join(RESOLUTIONS) + " or WIDTHxHEIGHT, for example 832x480"
    raise InvalidRequestError("resolution", text, allowed)


def frames_for_seconds(seconds: float, fps: int = 16, stride: int = 4) -> int:
    """The legal frame count nearest to a duration: `stride * n + 1`."""
    return max(0, round(seconds * fps / stride)) * stride + 1


def _generated_side(name: str, side: int, spec: ModelSpec) -> int:
    multiple = spec.size_multiple
    limit = spec.transformer.rope_max_seq_len * multiple
    if side > limit:
        raise InvalidRequestError(name, side, f"at most {limit} pixels", limit)
    if side % multiple == 0 or side == CROPPED_SIDE:
        return -(-side // multiple) * multiple
    low = max(multiple, side // multiple * multiple)
    nearest = f"{low} or {side // multiple * multiple + multiple}" if side > multiple else str(multiple)
    raise InvalidRequestError(name, side, f"a multiple of {multiple} (or {CROPPED_SIDE}, which is cropped)", nearest)


def _check_frames(num_frames: int, spec: ModelSpec) -> None:
    stride = spec.vae.temporal_stride
    limit = (spec.transformer.rope_max_seq_len - 1) * stride + 1
    if num_frames > limit:
        raise InvalidRequestError("num_frames", num_frames, f"at most {limit} frames", limit)
    if (num_frames - 1) % stride:
        low = (num_frames - 1) // stride * stride + 1
        raise InvalidRequestError(
            "num_frames", num_frames, f"a number of the form {stride}n+1", f"{low + stride} or {low}"
        )


def _explain(error: ValidationError) -> InvalidRequestError:
    """The first problem of a pydantic error in our words, with the nearest allowed value."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"]) or "request"
    context = first.get("ctx", {})
    bounds = {"greater_than_equal": "ge", "less_than_equal": "le"}
    nearest = context.get(bounds.get(first["type"], ""))
    given = None if first["type"] == "missing" else first.get("input")  # else the other fields would be shown
    return InvalidRequestError(name, given, _allowed(first["type"], first["msg"], context), nearest)


def _allowed(kind: str, message: str, context: dict[str, Any]) -> str:
    match kind:
        case "extra_forbidden":
            return "there is no such field; fields are " + ", ".join(GenerationRequest.model_fields)
        case "string_too_short":
            return "a text that is not empty"
        case "greater_than_equal":
            return f"at least {context['ge']}"
        case "less_than_equal":
            return f"at most {context['le']}"
        case "greater_than":
            return f"more than {context['gt']}"
        case "literal_error":
            return f"one of {context['expected']}"
        case "missing":
            return "it must be given"
        case "int_parsing" | "int_type" | "int_from_float" | "int_parsing_size":
            return "a whole number"
        case "float_parsing" | "float_type":
            return "a number"
        case "finite_number":
            return "a finite number"
        case _:
            return message[0].lower() + message[1:]
