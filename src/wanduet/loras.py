"""The LoRA files of a request, with their strengths, as the interfaces spell them. Reads no file."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from wanduet import miniature
from wanduet.request_fields import Real

# Names of the LoRAs that come with wanduet, which stand for their files where no operator's folder is set.
BUNDLED_LORAS: Mapping[str, Path] = {"miniature-ring": Path(miniature.__file__).parent / "lora" / "ring.safetensors"}
STRONGEST = 10.0  # the largest strength, in magnitude
MOST_LORAS = 32  # of one request
SPELLING = "FILE[:STRENGTH[@FROM-TO]], for example style.safetensors:0.8 or style.safetensors:1@0-0.5"
_NUMBER = r"(?:\d+\.?\d*|\.\d+)"
_SPELLED = re.compile(rf"(?P<name>.+?):(?P<strength>[-+]?{_NUMBER})(?:@(?P<start>{_NUMBER})-(?P<end>{_NUMBER}))?", re.S)


class Lora(BaseModel):
    """One LoRA of a request: base weights + `strength` * update, in the steps of the shares from `start` to `end`.

    `name`: a file's path, or its name in the operator's folder, or one of BUNDLED_LORAS. `sha256`: of the file, set when the request is resolved;
    one that is given must match.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    strength: Real = Field(default=1.0, ge=-STRONGEST, le=STRONGEST)
    start: Real = Field(default=0.0, ge=0.0, lt=1.0)
    end: Real = Field(default=1.0, gt=0.0, le=1.0)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        fields = fields_of_text(value)
        if abs(fields.get("strength", 0.0)) > STRONGEST:
            allowed = f"a strength of -{STRONGEST:g} to {STRONGEST:g}, for example style.safetensors:0.8"
            raise PydanticCustomError("loras", "{allowed}", {"allowed": allowed})
        if not 0 <= fields.get("start", 0.0) < fields.get("end", 1.0) <= 1:
            allowed = "shares of the steps from 0 to 1, the smaller one first, for example style.safetensors:1@0-0.5"
            raise PydanticCustomError("loras", "{allowed}", {"allowed": allowed})
        return fields

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.start >= self.end:
            shares = f"{self.start:g}-{self.end:g}"
            raise PydanticCustomError(
                "loras", "Shares of the steps that begin before they end, not {shares}", {"shares": shares}
            )
        return self

    @property
    def file_name(self) -> str:
        """The name of the file, without its folder."""
        return Path(self.name).name

    def recorded(self) -> dict[str, Any]:
        """Return the fields as records of a video have them: without the file's folder, and with the steps' shares only if
        they are not all steps."""
        shares = {} if (self.start, self.end) == (0.0, 1.0) else {"start": self.start, "end": self.end}
        return {"name": self.file_name, "strength": self.strength, **shares, "sha256": self.sha256}


def fields_of_text(text: str) -> dict[str, Any]:
    """Parse SPELLING. A colon that no number follows belongs to the name, as in `C:\\loras\\style.safetensors`."""
    match = _SPELLED.fullmatch(text)
    if match is None:
        return {"name": text}
    return {name: value if name == "name" else float(value) for name, value in match.groupdict().items() if value}


def has_effect(loras: Iterable[Lora] | None) -> bool:
    """Return whether any of a request's LoRAs changes the weights."""
    return any(lora.strength for lora in loras or ())


def loras_at(loras: Iterable[Lora], step: int, num_steps: int) -> tuple[Lora, ...]:
    """Return those that change the weights in step `step` of `num_steps` that are made; strength 0 changes nothing."""
    return tuple(
        lora
        for lora in loras
        if lora.strength and _first(lora.start, num_steps) <= step < max(_first(lora.end, num_steps), 1)
    )


def _first(share: float, num_steps: int) -> int:
    """The first step after a share of the steps; rounded up, as the steps of `guidance_gate` are."""
    return math.ceil(round(share * num_steps, 6))
