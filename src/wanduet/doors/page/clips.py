"""The video that a form starts from, and what the page reads from a video that was dropped or chosen.

The browser keeps the file and sends it with the submission; the form has what the server has read from it.
"""

import math
from dataclasses import dataclass
from typing import Any

from wanduet.doors.http.public import NAME_LIMIT, public_text
from wanduet.source_video import SourceVideo

SAME_INPUT = "the same input video"
_LONGEST_SIDE = 2**15  # pixels
_LONGEST_SECONDS = 10**6


@dataclass(frozen=True, slots=True)
class Clip:
    """An input video. `source`: of a file that the browser keeps; `job`: of the job whose stored input it is."""

    name: str
    source: SourceVideo | None = None
    job: str | None = None

    @property
    def sha256(self) -> str:
        """The hash of the browser's file; empty for a stored input."""
        return "" if self.source is None else self.source.sha256


@dataclass(frozen=True, slots=True)
class Offer:
    """What a dropped video can be used for: its settings as a form, with a note, its pictures as a clip, or neither."""

    name: str
    form: dict[str, Any] | None = None
    note: str = ""
    clip: Clip | None = None
    error: str = ""


def offer_of(answer: dict[str, Any]) -> Offer:
    """Convert what the browser repeats of the server's answer; parts that the server cannot have sent are left out."""
    name = public_text(str(answer.get("name") or "that video"), NAME_LIMIT)
    form, source = answer.get("form"), _source_of(answer.get("source"))
    return Offer(
        name,
        form if isinstance(form, dict) else None,
        str(answer.get("note") or ""),
        None if source is None else Clip(name, source),
        str(answer.get("error") or ""),
    )


def _source_of(answer: Any) -> SourceVideo | None:
    try:
        source = SourceVideo(**answer)
        sides_fit = all(type(side) is int and 0 < side <= _LONGEST_SIDE for side in (source.height, source.width))
        seconds_fit = math.isfinite(source.seconds) and 0 <= source.seconds <= _LONGEST_SECONDS
        is_hash = len(source.sha256) == 64 and set(source.sha256) <= set("0123456789abcdef")
    except TypeError:
        return None
    return source if sides_fit and seconds_fit and is_hash else None
