"""The fields of a request that set the schedule: the sampler, its number of steps and their noise levels."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError, PydanticKnownError

from wanduet.errors import InvalidRequestError
from wanduet.family.spec import GenerationDefaults

SamplerName = Literal["unipc", "unipc-official", "dpm++2m", "euler", "renoise"]
SAMPLERS: dict[SamplerName, str] = {
    "unipc": "UniPC of order 2 with diffusers' noise levels (1 to 0.001 before the shift)",
    "unipc-official": "the same with the official code's noise levels (0.999 to 0 before the shift)",
    "dpm++2m": "DPM-Solver++ of order 2, multistep",
    "euler": "Euler steps",
    "renoise": "new noise after each step, for few-step weights",
}
TIMESTEP_SAMPLERS: tuple[SamplerName, ...] = ("euler", "renoise")  # those that take any list of timesteps
MOST_STEPS = 1000
_KIND = "timesteps"


def joined(values: Sequence[float]) -> str:
    """Return numbers as text that is read as the same numbers: `1000,757,522`."""
    return ",".join(f"{value:g}" if float(f"{value:g}") == value else repr(value) for value in values)


def _split(value: Any) -> Any:
    """Split a text, `1000,757` or `[1000, 757]`: forms, flags and spreadsheets have no lists."""
    if isinstance(value, str):
        return value.strip().removeprefix("[").removesuffix("]").split(",")
    if isinstance(value, list | tuple) and any(isinstance(item, bool) for item in value):
        raise PydanticKnownError("float_type")
    return value


def _check(value: tuple[float, ...]) -> tuple[float, ...]:
    if not 1 <= len(value) <= MOST_STEPS:
        raise PydanticCustomError(_KIND, f"From 1 to {MOST_STEPS} numbers")
    if any(after >= before for before, after in pairwise(value)):
        raise PydanticCustomError(_KIND, "Each must be less than the one before")
    return value


# From 1000 (noise) to 0, which is excluded: the last step ends there. Read from a list or from text.
Timesteps = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)], ...],
    BeforeValidator(_split),
    AfterValidator(_check),
]


def resolved_schedule(fields: Mapping[str, Any], defaults: GenerationDefaults) -> dict[str, Any]:
    """Return a request's timesteps, and the number of steps that follows from them.

    `fields`: of the request, None where it gives no value. The timesteps of few-step weights (`defaults`) are used if it
    gives no other schedule. Raises InvalidRequestError for fields that exclude each other.
    """
    sampler = fields["sampler"] or defaults.sampler
    timesteps, steps, shift = (fields[name] for name in ("timesteps", "num_inference_steps", "flow_shift"))
    if timesteps is None:
        own = defaults.timesteps
        if own and sampler == defaults.sampler and shift is None and steps in (None, len(own)):
            return {"timesteps": own, "num_inference_steps": len(own)}
        return {"timesteps": None}
    number = len(timesteps)
    if sampler not in TIMESTEP_SAMPLERS:
        allowed = f"only with the sampler {' or '.join(TIMESTEP_SAMPLERS)}; {sampler} has timesteps of its own"
        raise InvalidRequestError("timesteps", joined(timesteps), allowed)
    if shift is not None:
        raise InvalidRequestError("flow_shift", shift, "it does not change given timesteps, so leave it out")
    if steps not in (None, number):
        allowed = f"there are {number} timesteps, so leave the number of steps out"
        raise InvalidRequestError("num_inference_steps", steps, allowed, number)
    return {"timesteps": timesteps, "num_inference_steps": number}


def few_step_warnings(fields: Mapping[str, Any], defaults: GenerationDefaults) -> list[str]:
    """Return a warning for each setting of a resolved request that few-step weights or LoRA were not distilled for; none
    for others. `defaults`: of the model with its LoRA. Guidance with few-step weights is refused (`family.guidance`)."""
    if not defaults.timesteps:
        return []
    found = []
    if fields["guidance_scale"] > 1.0 >= defaults.guidance_scale:
        found.append(
            f"A LoRA is distilled to run without guidance. With guidance_scale={fields['guidance_scale']:g} a step takes twice "
            "as long, and at full strength the video is blurred."
        )
    if defaults.of_distilled_weights and (fields["sampler"], fields["timesteps"]) != (
        defaults.sampler,
        defaults.timesteps,
    ):
        found.append(
            f"These weights are distilled for the sampler {defaults.sampler} at the timesteps {joined(defaults.timesteps)}. "
            "With another schedule the video may be blurred or noisy."
        )
    return found
