"""The video that a form starts from.

The browser keeps the file and sends it with the submission; the form has what the server has read from it.
"""

import math
from dataclasses import dataclass
from typing import Any

from wanduet.doors.http.public import NAME_LIMIT, public_text
from wanduet.jobs.records import is_job_id
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


def clip_of(value: Any) -> Clip | None:
    """Return the input video that a browser names in its form; None for what the server cannot have sent."""
    if not isinstance(value, dict):
        return None
    name, job = public_text(str(value.get("name") or "that video"), NAME_LIMIT), value.get("job")
    if isinstance(job, str):
        return Clip(name, job=job) if is_job_id(job) else None
    source = _source_of(value.get("source"))
    return None if source is None else Clip(name, source)


def _source_of(answer: Any) -> SourceVideo | None:
    try:
        source = SourceVideo(**answer)
        sides_fit = all(type(side) is int and 0 < side <= _LONGEST_SIDE for side in (source.height, source.width))
        seconds_fit = math.isfinite(source.seconds) and 0 <= source.seconds <= _LONGEST_SECONDS
        is_hash = len(source.sha256) == 64 and set(source.sha256) <= set("0123456789abcdef")
    except TypeError:
        return None
    return source if sides_fit and seconds_fit and is_hash else None
