"""The named speeds: sets of request fields, from exact to the fastest."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Speed:
    """A name and the request fields that it sets; an exact one sets none."""

    name: str
    fields: Mapping[str, Any]


SPEEDS: tuple[Speed, ...] = (
    Speed("exact", {}),
    Speed("near", {"step_cache": "easycache:0.02"}),
    Speed("fine", {"step_cache": "easycache:0.05"}),
    Speed("fast", {"step_cache": "easycache:0.1"}),
    Speed("draft", {"step_cache": "easycache:0.2"}),
)
