"""In which steps a request is guided, and how guidance combines the two velocities. Does not import torch.

Sources: CFG-Zero*, arXiv 2503.18886; adaptive projected guidance (APG), arXiv 2410.02416; guidance in an interval, arXiv
2404.07724.
"""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from wanduet.errors import InvalidRequestError
from wanduet.family.spec import ModelSpec
from wanduet.request_fields import Shown

GuidanceMode = Literal["cfg", "cfg-zero", "apg"]
CFG: GuidanceMode = "cfg"
ALL_STEPS = "0-1"
# The share of the steps, the first, in which CFG-Zero* leaves the latents as they are; the paper's.
ZERO_SHARE = 0.04
_SHARE = r"\s*([01]|[01]?\.\d{1,2})\s*"


def _check(text: str) -> str:
    found = re.fullmatch(f"{_SHARE}-{_SHARE}", text, re.ASCII)
    begin, end = map(float, found.groups()) if found else (1.0, 0.0)
    if not begin < end <= 1:
        raise PydanticCustomError(
            "guidance_interval", "Two shares of the steps from 0 to 1 with at most two decimals, for example 0.1-0.8"
        )
    return f"{begin:g}-{end:g}"


ModeField = Annotated[
    GuidanceMode,
    Shown(row=4, off=CFG),
    Field(
        description="How guidance combines the velocities of both prompts: cfg, the usual way; cfg-zero (CFG-Zero*), which "
        "scales that of the negative prompt and leaves out the first 4 % of the steps; apg, which limits guidance and removes "
        "the part that makes colours too strong. Another video, in about the same time."
    ),
]
IntervalField = Annotated[
    str,
    AfterValidator(_check),
    Shown(row=8, lines=1, off=ALL_STEPS),
    Field(
        description="The steps that are guided, as shares of the steps, for example 0.1-0.8; the others take half the time. In "
        "place of a guidance gate, which is the same from 0 on. Faster, and another video."
    ),
]


def guided_range(interval: str, gate: float, num_steps: int) -> range:
    """Return the steps, of a run of so many, that are guided: those of an interval, but none after the gate."""
    begin, end = map(float, interval.split("-"))
    return range(_steps(begin, num_steps), _steps(min(end, gate), num_steps))


def zero_steps(mode: GuidanceMode, num_steps: int) -> int:
    """Return how many of a run's steps, its first, have velocity 0. The run must begin at noise."""
    return round(ZERO_SHARE * num_steps) if mode == "cfg-zero" else 0


def check_guidance(fields: Mapping[str, Any], spec: ModelSpec) -> None:
    """Raise InvalidRequestError if fields of a resolved request change a guidance that it does not have, or contradict
    each other."""
    scale, defaults = fields["guidance_scale"], spec.defaults
    if defaults.of_distilled_weights and scale > 1 >= defaults.guidance_scale:
        allowed = f"at most 1 with {spec.name}, whose weights are distilled to run without guidance: leave it out"
        raise InvalidRequestError("guidance_scale", scale, allowed, 1)
    exact: Mapping[str, Any] = {"guidance_gate": 1, "guidance_interval": ALL_STEPS, "guidance_mode": CFG}
    for name, off in exact.items():
        if fields[name] != off and scale <= 1:
            raise InvalidRequestError(name, fields[name], f"{off} without guidance (scale 1)", off)
    gate, mode = fields["guidance_gate"], fields["guidance_mode"]
    if fields["guidance_interval"] != ALL_STEPS and gate < 1:
        allowed = f"1 with guidance_interval={fields['guidance_interval']}, which also says where guidance ends"
        raise InvalidRequestError("guidance_gate", gate, allowed, 1)
    if mode != CFG and defaults.timesteps:
        raise InvalidRequestError(
            "guidance_mode", mode, f"{CFG} with few-step weights, which are distilled to run without guidance", CFG
        )


def _steps(share: float, num_steps: int) -> int:
    return math.ceil(round(share * num_steps, 6))
