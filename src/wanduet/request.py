"""The schema of a request: one frozen definition for all interfaces (command line, Python, HTTP, page).

This is the only definition of a field: its limits and help (`description`) in pydantic's terms, and in `Shown` what an
interface needs besides to display it. The command line's flags, the body of `POST /v1/videos`, the page's form and the
tables in docs/ are generated from `REQUEST_FIELDS`.

`GenerationRequest.resolve` replaces None by the model's defaults. Invalid values raise an error with the nearest
allowed value, before any model is loaded.
"""

import random
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wanduet.errors import InvalidRequestError
from wanduet.family.attention import FIELD as QUANTIZE_ATTENTION
from wanduet.family.attention import AttentionField, check_quantize_attention
from wanduet.family.guidance import IntervalField, ModeField, check_guidance, guided_range, zero_steps
from wanduet.family.low_res import check_low_res
from wanduet.family.sizes import check_frames, generated_side
from wanduet.family.sparsity import ALL, check_sparse
from wanduet.family.spec import ModelSpec
from wanduet.family.speeds import (
    CHOSEN,
    EXACT,
    FIELDS,
    Price,
    Prices,
    SpeedName,
    fields_set_by,
    not_measured,
    price_of_speed,
    within,
)
from wanduet.family.speeds import refused as refused_speed
from wanduet.family.step_caches import OFF, StepCacheSetting, check_steps
from wanduet.loras import MOST_LORAS, Lora, has_effect
from wanduet.request_fields import Real, RequestField, Shown, Whole, explain, fields_of
from wanduet.schedule import SAMPLERS, TIMESTEP_SAMPLERS, SamplerName, Timesteps, resolved_schedule
from wanduet.source_video import SIDES, SourceVideo, by_what_was_given

MAX_SEED = 2**63 - 1
DEFAULT_STRENGTH = 0.8  # of a request with an input video
INPUT_HASH = "sha256:"  # before the hash that stands for an input video in records
# Fields that save work, at a loss.
APPROXIMATIONS = (
    "step_cache", "guidance_gate", "guidance_interval", "sparse", "quantize", QUANTIZE_ATTENTION, "low_res_first",
)  # fmt: skip
OPTIONAL = (*APPROXIMATIONS, "guidance_mode")  # fields that are not recorded where they do nothing
MAX_PROMPT = 8000  # characters of a prompt; the text encoder reads 512 tokens


class GenerationRequest(BaseModel):
    """One prompt and the settings of its video. Sizes are in pixels of the output video."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Annotated[str, Shown(detail="")] = Field(min_length=1, description="What the video shows.")
    # None: the model's default; "": no negative prompt
    negative_prompt: Annotated[str | None, Shown(row=6, detail="")] = Field(
        default=None,
        description="What the video should not show; '' for nothing. Default: the model's, a list of flaws for Wan2.1.",
    )
    num_frames: Annotated[Whole | None, Shown(label="Frames", row=2, step=4, detail="", limit="frames")] = Field(
        default=None, ge=1, description="Number of frames, 4n+1. Default: the model's, 81 for Wan2.1."
    )
    height: Annotated[Whole | None, Shown(label="Size", row=1, within="size", detail="")] = Field(
        default=None, ge=16, description="In pixels, a multiple of 16. Default: the model's, 480 for Wan2.1."
    )
    width: Annotated[Whole | None, Shown(label="Size", row=1, within="size", detail="")] = Field(
        default=None, ge=16, description="In pixels, a multiple of 16. Default: the model's, 832 for Wan2.1."
    )
    num_inference_steps: Annotated[
        Whole | None, Shown(label="Steps", row=3, span=(1, 100), aliases=("--steps",), limit="steps")
    ] = Field(
        default=None, ge=1, le=1000, description="Number of denoising steps. Default: the model's, 50 for Wan2.1."
    )
    guidance_scale: Annotated[Real | None, Shown(label="Guidance", row=4, span=(1, 15), step=0.5)] = Field(
        default=None,
        ge=0.0,
        le=100.0,
        description="How closely the prompt is followed; 1 turns guidance off, and halves the time. Default: the model's, 6 for "
        "Wan2.1 1.3B, 5 for 14B.",
    )
    guidance_mode: ModeField = "cfg"
    flow_shift: Annotated[Real | None, Shown(row=4, span=(0.5, 20), step=0.5, detail="Shift")] = Field(
        default=None,
        gt=0.0,
        le=100.0,
        description="Higher values spend more steps on the layout, lower ones on details. Default: the model's, 8 for Wan2.1 "
        "1.3B, 5 for 14B.",
    )
    sampler: Annotated[SamplerName | None, Shown(row=3)] = Field(
        default=None,
        description="The solver: "
        + "; ".join(f"{name}: {meaning}" for name, meaning in SAMPLERS.items())
        + ". Default: the model's, unipc for Wan2.1.",
    )
    timesteps: Annotated[
        Timesteps | None, Shown(placeholder="1000,757,522", replaces=("num_inference_steps", "flow_shift"))
    ] = Field(
        default=None,
        description="The timesteps of the steps, for example 1000,757,522: from 1000 (noise) towards 0, in place of a number "
        f"of steps and a shift; with the sampler {' or '.join(TIMESTEP_SAMPLERS)}. Default: none, or those of few-step weights.",
    )
    seed: Annotated[Whole | None, Shown(row=1, placeholder="a new one each time")] = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="The same seed and settings give the same video. Default: random.",
    )
    fps: Annotated[Whole | None, Shown(label="Frame rate", row=2, span=(1, 60), detail="")] = Field(
        default=None, ge=1, le=120, description="Frames per second of the file. Default: the model's, 16 for Wan2.1."
    )
    num_videos_per_prompt: Annotated[
        Whole, Shown(label="Videos", caption="Videos of this prompt", row=5, detail="", limit="videos")
    ] = Field(default=1, ge=1, le=64, description="Number of videos, with consecutive seeds.")
    speed: Annotated[SpeedName | None, Shown(row=7, start=EXACT, off=EXACT)] = Field(
        default=None,
        description="How much work may be skipped: exact (none), near, fine, fast or draft, each faster than the one before "
        f"and less like the exact video. It sets {' and '.join(sorted(CHOSEN))}; one of these that is given beside it is "
        "kept. Default: exact.",
    )
    loss_budget: Annotated[Real | None, Shown(row=7, placeholder="dB", replaces=("speed", *OPTIONAL))] = Field(
        default=None,
        gt=0.0,
        le=100.0,
        description="In place of a speed: take the fastest one, or one with attention in 8 bits, whose PSNR to the exact video is at least so many dB, of the worst "
        "prompt that was measured on this machine, else as published. 40 is hard to see, 30 is plain to see in places.",
    )
    step_cache: Annotated[str, Shown(row=8, lines=1, off=OFF)] = Field(
        default=OFF,
        description="Skip the transformer in steps that change little: easycache, magcache or teacache (the last two for "
        "Wan2.1 1.3B and 14B), and after a colon a threshold, for example easycache:0.05. Faster, and another video.",
    )
    guidance_gate: Annotated[Real, Shown(row=8, off=1.0, span=(0, 1), step=0.05)] = Field(
        default=1.0,
        ge=0.0,
        le=1.0,
        description="The share of the steps that are guided: after it, guidance is off, and a step takes half the time.",
    )
    guidance_interval: IntervalField = "0-1"
    sparse: Annotated[Real, Shown(row=7, off=ALL, span=(0.05, 1), step=0.05)] = Field(
        default=ALL,
        gt=0.0,
        le=1.0,
        description="The share of the keys that self-attention reads, for example 0.5: those that match best, by blocks. After the "
        "first quarter of the steps; in all steps with weights that are trained for it (VSA, SLA), whose own share is their default. "
        "Faster, and another video.",
    )
    quantize: Annotated[Literal["off", "fp8", "int8"], Shown(row=7, label="Products", off=OFF)] = Field(
        default="off",
        description="Compute the large matrix products in 8 bits: fp8 (GPUs of compute capability 8.9 and later) or int8 "
        "(8.0 and later). Faster, and another video.",
    )
    quantize_attention: AttentionField = "off"
    low_res_first: Annotated[bool, Shown(label="Low resolution first", row=7, off=False)] = Field(
        default=False,
        description="Make the first steps on a smaller video and enlarge its latents: 720p from 480p, for example. Faster, and "
        "another video. Not for 480p: the model cannot make the smaller one.",
    )
    # A path, or in the records of a made video "sha256:" and the file's hash
    input_video: Annotated[str | None, Shown(is_file=True, detail="")] = Field(
        default=None,
        min_length=1,
        description="A video to start from, instead of noise. Size and number of frames follow it by default; it is cropped "
        "to other proportions.",
    )
    strength: Annotated[Real | None, Shown(span=(0, 1), step=0.05, start=DEFAULT_STRENGTH, needs="input_video")] = (
        Field(
            default=None,
            ge=0.0,
            le=1.0,
            description="How much of the input video is made anew: 0 keeps it, 1 ignores it. Default with one: 0.8.",
        )
    )

    loras: tuple[Lora, ...] | None = Field(default=None, max_length=MOST_LORAS)

    @classmethod
    def parse(cls, **values: Any) -> Self:
        """Build a request. Raises InvalidRequestError instead of pydantic's ValidationError."""
        try:
            request = cls(**values)
        except ValidationError as error:
            raise explain(error, cls.model_fields) from None
        if not request.prompt.strip():
            raise InvalidRequestError("prompt", request.prompt, "a text that is not empty")
        return request

    def resolve(
        self, spec: ModelSpec, source: SourceVideo | None = None, prices: Prices = not_measured
    ) -> "ResolvedRequest":
        """Replace None by the model's defaults and a random seed, a loss budget by a speed, a speed by the fields that it
        sets, and check sizes against the model's shapes.

        `source`: what `input_video` is, if that is a path. `media.input_video.resolve` reads it. `prices`: what speeds lose.

        Raises InvalidRequestError, and ValueError for a path without a source.
        """
        if self.loss_budget is not None:
            return self._within_budget(self.loss_budget, spec, source, prices)
        of_speed = dict(fields_set_by(self.speed))
        if (spec.defaults.guidance_scale if self.guidance_scale is None else self.guidance_scale) <= 1:
            of_speed.pop("guidance_gate", None)  # there is no guidance to end
        own = {name: value for name, value in of_speed.items() if name not in self.model_fields_set}
        values = self.model_dump() | own | self._of_input(spec, source)
        for name, value in values.items():
            if value is None and hasattr(spec.defaults, name):
                values[name] = getattr(spec.defaults, name)
        values |= resolved_schedule(self.model_dump(), spec.defaults) | {"loras": self.loras or ()}
        if values["seed"] is None:
            values["seed"] = random.SystemRandom().randrange(2**32)
        for side in sorted(SIDES, key=lambda side: getattr(self, side) is None):  # those that are given first
            try:
                values[f"generated_{side}"] = generated_side(side, values[side], spec)
            except InvalidRequestError as error:
                raise by_what_was_given(error, self, values, spec.size_multiple) from None
        check_frames(values["num_frames"], spec)
        setting = StepCacheSetting.parse(values["step_cache"], spec.transformer)
        values["step_cache"] = OFF if setting is None else str(setting)
        resolved = ResolvedRequest(**values)
        size = (resolved.generated_height, resolved.generated_width, resolved.num_frames)
        try:
            if setting is not None:
                check_steps(setting, resolved.num_denoising_steps, resolved.sampler, spec)
            check_guidance(values, spec)
            check_low_res(values, spec)
            check_quantize_attention(values, spec)
            steps, attention = resolved.num_denoising_steps, spec.transformer.attention
            check_sparse(resolved.sparse, spec.num_tokens(*size), steps, attention)
        except InvalidRequestError as error:
            raise (refused_speed(self.speed, error, spec) if error.field in own else error) from None
        if self.speed == EXACT and resolved.approximates:
            given = ", ".join(f"{name}={value}" for name, value in resolved.approximations.items())
            raise InvalidRequestError("speed", EXACT, f"another speed, or none, with {given}")
        # A price is that of the speed's fields and the attention, without others.
        alone = OFF_VALUES | of_speed | {QUANTIZE_ATTENTION: resolved.quantize_attention}
        is_whole = all(getattr(resolved, name) == value for name, value in alone.items() if name not in own)
        is_whole &= not has_effect(self.loras)  # with LoRA, they are other weights than those that were measured
        price = price_of_speed(self.speed, spec, prices, resolved.quantize_attention) if is_whole else None
        return resolved.model_copy(update={"price": price})

    def _within_budget(
        self, budget: float, spec: ModelSpec, source: SourceVideo | None, prices: Prices
    ) -> "ResolvedRequest":
        """Resolve with the fastest set of fields that is known to keep the budget and that this run may have."""
        for name in ("speed", *OFF_VALUES):
            is_given = name in CHOSEN and name in self.model_fields_set  # off, too: the budget would switch it on
            if is_given or getattr(self, name) != type(self).model_fields[name].default:
                is_set = name in ("speed", *CHOSEN, QUANTIZE_ATTENTION)
                why = "loss_budget sets it" if is_set else "what it loses beside a speed is not known"
                raise InvalidRequestError(name, getattr(self, name), f"{why}; leave one of the two out")
        unset = self.model_copy(update={"loss_budget": None})
        for fields in ({"speed": EXACT},) if has_effect(self.loras) else within(budget, spec, prices):
            with suppress(InvalidRequestError):
                resolved = unset.model_copy(update=fields).resolve(spec, source, prices)
                return resolved.model_copy(update={"loss_budget": budget})
        return unset.resolve(spec, source)

    def _of_input(self, spec: ModelSpec, source: SourceVideo | None) -> dict[str, Any]:
        """Return the fields that follow from the input video: its hash, and defaults that are not given."""
        if self.input_video is None:
            if self.strength is not None:
                raise InvalidRequestError(
                    "strength", self.strength, "only together with input_video, the video to start from"
                )
            return {"input_sha256": None}
        found: dict[str, Any] = {"strength": DEFAULT_STRENGTH if self.strength is None else self.strength}
        if self.input_video.startswith(INPUT_HASH):
            return found | {"input_sha256": self.input_video.removeprefix(INPUT_HASH)}
        if source is None:
            raise ValueError("The input video has not been read.")
        defaults, stride = spec.defaults, spec.vae.temporal_stride
        length = source.frames_at(self.fps or defaults.fps)
        most = (length - 1) // stride * stride + 1
        if self.num_frames is None:
            found["num_frames"] = min(most, defaults.num_frames)
        elif self.num_frames > most:
            allowed = f"at most {most}, as the input video has {length} at this frame rate"
            raise InvalidRequestError("num_frames", self.num_frames, allowed, most)
        found |= source.sizes(self.height, self.width, defaults.height * defaults.width, spec.size_multiple)
        return found | {"input_sha256": source.sha256}


class ResolvedRequest(GenerationRequest):
    """A request with a value in every field. The engine runs it, and the MP4's metadata contain it."""

    negative_prompt: str
    height: int
    width: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float  # without effect if there are timesteps
    sampler: SamplerName
    seed: int
    generated_height: int  # rows that the model generates; those beyond `height` are cropped
    generated_width: int
    loras: tuple[Lora, ...] = ()
    input_sha256: str | None = None  # of the input video's file
    price: Price | None = None  # of `speed` and `quantize_attention`, if it is known and no other field changes it

    @property
    def num_denoising_steps(self) -> int:
        """How many of the schedule's steps are run, its last: with an input video, the share `strength` of them."""
        if self.strength is None:
            return self.num_inference_steps
        return min(int(self.num_inference_steps * self.strength), self.num_inference_steps)  # as in diffusers

    @property
    def first_step(self) -> int:
        """The index in the schedule of the first step that is run; an input video is less noisy than those before it."""
        return self.num_inference_steps - self.num_denoising_steps

    @property
    def num_zero_steps(self) -> int:
        """How many steps of the schedule, its first, have velocity 0 and no forward (CFG-Zero*)."""
        begins_at_noise = self.uses_guidance and not self.uses_input
        return zero_steps(self.guidance_mode, self.num_denoising_steps) if begins_at_noise else 0

    @property
    def guided_steps(self) -> range:
        """The steps that also compute the negative prompt, as indices in the schedule."""
        steps, first = self.num_denoising_steps if self.uses_guidance else 0, self.first_step
        found = guided_range(self.guidance_interval, self.guidance_gate, steps)
        return range(max(first + found.start, self.num_zero_steps), first + found.stop)

    @property
    def ends_guidance(self) -> bool:
        """Whether there is guidance, but not in all steps: some have one forward."""
        return self.uses_guidance and self.num_zero_steps + len(self.guided_steps) < self.num_denoising_steps

    @property
    def approximations(self) -> dict[str, Any]:
        """The fields by which the video is approximated, with their values; {} for an exact one."""
        return {name: given for name, off in EXACT_VALUES.items() if (given := getattr(self, name)) != off}

    @property
    def approximates(self) -> bool:
        """Whether the video is made with less work than the model asks for, at a loss."""
        return bool(self.approximations)

    @property
    def uses_input(self) -> bool:
        """Whether the result depends on the pictures of an input video; with strength 1 it does not."""
        return self.input_video is not None and self.num_denoising_steps < self.num_inference_steps

    def recorded(self) -> dict[str, Any]:
        """Return the fields as records of a video have them: an input video by its hash, not by its path. Fields without
        effect are left out: those of an input video if there is none, those that are off, the
        timesteps or the shift that they replace, and speed and loss budget, which have set other fields."""
        off = {name for name, value in OFF_VALUES.items() if getattr(self, name) == value}
        unused = "timesteps" if self.timesteps is None else "flow_shift"
        values = self.model_dump(exclude={"input_sha256", "price", "loras", *FIELDS, unused} | off)
        if self.loras:
            values["loras"] = [lora.recorded() for lora in self.loras]
        if self.timesteps is not None:
            values["timesteps"] = list(self.timesteps)  # as JSON has it
        if self.input_video is None:
            return {name: value for name, value in values.items() if name not in ("input_video", "strength")}
        return values | {"input_video": f"{INPUT_HASH}{self.input_sha256}"}

    @property
    def uses_guidance(self) -> bool:
        """Whether each step also computes the negative prompt (guidance scale above 1)."""
        return self.guidance_scale > 1.0

    @property
    def seconds(self) -> float:
        """Length of the video in seconds."""
        return self.num_frames / self.fps

    def as_request(self) -> GenerationRequest:
        """Return an equivalent GenerationRequest; resolving it again gives the same ResolvedRequest, in which an input
        video is named by its hash. A loss budget is replaced by the speed that it has chosen."""
        names = GenerationRequest.model_fields
        of_speed = {name: getattr(self, name) for name in ("speed", *fields_set_by(self.speed))}
        return GenerationRequest(**{k: v for k, v in (self.recorded() | of_speed).items() if k in names})


def check_prompt_length(name: str, text: str, most: int = MAX_PROMPT) -> None:
    """Raise InvalidRequestError if a prompt (field `name`) has more than `most` characters."""
    if len(text) > most:
        raise InvalidRequestError(name, f"{len(text)} characters", f"at most {most} characters")


REQUEST_FIELDS: Mapping[str, RequestField] = fields_of(GenerationRequest)
OFF_VALUES = {name: REQUEST_FIELDS[name].shown.off for name in OPTIONAL}
EXACT_VALUES = {name: OFF_VALUES[name] for name in APPROXIMATIONS}


def exclude(one: str, other: str) -> bool:
    """Return whether two fields are not given together, because one replaces the other."""
    return any(a in REQUEST_FIELDS and b in REQUEST_FIELDS[a].shown.replaces for a, b in ((one, other), (other, one)))
