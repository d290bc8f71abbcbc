"""The job's interface for the code that does its work: progress events, cancellation, timings and notes."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from wanduet.errors import CancelledError

Phase = Literal["verify", "load", "encode", "encode_video", "denoise", "decode", "done", "failed"]
# Only in the timings of jobs that have the phase.
RARE_TIMING_NAMES = ("encode_video_s",)
_IN_ORDER = (
    "verify_s", "load_s", "prepare_s", "encode_s", "encode_video_s", "denoise_s", "decode_s", "write_s", "total_s",
)  # fmt: skip
TIMING_NAMES = tuple(name for name in _IN_ORDER if name not in RARE_TIMING_NAMES)


@dataclass(frozen=True, slots=True)
class Event:
    """Progress of a job: `done` of `total` units of a phase (MiB hashed, layers, steps, frames), for video `video`."""

    phase: Phase
    done: int = 0
    total: int = 0
    video: int = 0
    seconds_left: float | None = None
    message: str = ""


class Timings:
    """Seconds by phase. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = dict.fromkeys(_IN_ORDER, 0.0)

    def __getstate__(self) -> dict[str, float]:
        with self._lock:
            return dict(self._seconds)

    def __setstate__(self, seconds: dict[str, float]) -> None:
        self._lock, self._seconds = threading.Lock(), seconds

    def __getitem__(self, name: str) -> float:
        """Return the seconds of one phase so far."""
        with self._lock:
            return self._seconds[name]

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to one phase."""
        with self._lock:
            self._seconds[name] += seconds

    def at_least(self, name: str, seconds: float) -> None:
        """Raise one phase to `seconds` if it is lower."""
        with self._lock:
            self._seconds[name] = max(self._seconds[name], seconds)

    @staticmethod
    def sum(*parts: "Timings") -> dict[str, float]:
        """Return the sum of each phase over all parts; of RARE_TIMING_NAMES only those that are not 0."""
        copies = []
        for part in parts:
            with part._lock:
                copies.append(dict(part._seconds))
        sums = {name: sum(copy[name] for copy in copies) for name in _IN_ORDER}
        return {name: seconds for name, seconds in sums.items() if seconds or name in TIMING_NAMES}


def never() -> bool:
    """Return False: a check that never cancels."""
    return False


def ignore(*_: object) -> None:
    """Do nothing: a callback that needs nothing."""


@dataclass(frozen=True, slots=True)
class RunContext:
    """Callbacks from a piece of work to its job. The defaults do nothing, for work without a job.

    `id` is the job's id. `emit` publishes progress. `should_cancel` returns True once the job is cancelled;
    `should_cancel_in_step`, if given, is called in its place before each block of a step. `wait(seconds)` sleeps, and returns early on a cancel. `add_time(name, seconds)` adds to a timing of TIMING_NAMES or
    RARE_TIMING_NAMES.
    `note` records a deviation from the plan, in a few words that go into the video's metadata. All may be called from
    any thread.
    """

    id: str = ""
    emit: Callable[[Event], None] = ignore
    should_cancel: Callable[[], bool] = never
    wait: Callable[[float], object] = time.sleep
    add_time: Callable[[str, float], None] = ignore
    note: Callable[[str], None] = ignore
    should_cancel_in_step: Callable[[], bool] | None = None

    def check_cancelled(self) -> None:
        """Raise CancelledError if the job was cancelled."""
        if self.should_cancel():
            raise CancelledError("The job was cancelled.")

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the block's seconds to a timing, also when it fails."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add_time(name, time.perf_counter() - began)


NO_JOB = RunContext()
