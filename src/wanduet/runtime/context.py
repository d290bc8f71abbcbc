"""What the code that does a job's work gets of the job: where progress goes, how a cancel is noticed, whose seconds count."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from wanduet.errors import CancelledError

Phase = Literal["verify", "load", "encode", "denoise", "decode", "done", "failed"]
TIMING_NAMES = ("verify_s", "load_s", "prepare_s", "encode_s", "denoise_s", "decode_s", "write_s", "total_s")


@dataclass(frozen=True, slots=True)
class Event:
    """Progress of a job: `done` of `total` units of a phase (MiB that are hashed, layers, steps, frames), for one of its videos."""

    phase: Phase
    done: int = 0
    total: int = 0
    video: int = 0
    seconds_left: float | None = None
    message: str = ""


class Timings:
    """Seconds by phase; from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = dict.fromkeys(TIMING_NAMES, 0.0)

    def __getitem__(self, name: str) -> float:
        """The seconds of one phase so far."""
        with self._lock:
            return self._seconds[name]

    def add(self, name: str, seconds: float) -> None:
        """Add to one of them."""
        with self._lock:
            self._seconds[name] += seconds

    def at_least(self, name: str, seconds: float) -> None:
        """Raise one of them to a number."""
        with self._lock:
            self._seconds[name] = max(self._seconds[name], seconds)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the block's seconds to one of them, also when it fails."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    @staticmethod
    def sum(*parts: "Timings") -> dict[str, float]:
        """Each of them, over all parts."""
        copies = []
        for part in parts:
            with part._lock:
                copies.append(dict(part._seconds))
        return {name: sum(copy[name] for copy in copies) for name in TIMING_NAMES}


def _never() -> bool:
    return False


def _ignore(*_: object) -> None:
    pass


@dataclass(frozen=True, slots=True)
class RunContext:
    """The ties between a piece of work and the job that it is done for; by default, there is no job.

    `id` is the job's. `emit` publishes progress. `should_cancel` says whether the job's owner wants it to stop; `wait`
    sleeps so many seconds, or until then. `add_time(name, seconds)` adds to a timing of TIMING_NAMES. `note` records what
    did not go as planned, in a few words that go into the video's metadata. All may be called from any thread.
    """

    id: str = ""
    emit: Callable[[Event], None] = _ignore
    should_cancel: Callable[[], bool] = _never
    wait: Callable[[float], object] = time.sleep
    add_time: Callable[[str, float], None] = _ignore
    note: Callable[[str], None] = _ignore

    def check_cancelled(self) -> None:
        """Raise CancelledError if the job's owner wants it to stop."""
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
