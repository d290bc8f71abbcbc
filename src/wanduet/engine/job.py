"""A job as its owner sees it: events while it runs, a result, a way to cancel."""

import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from wanduet.engine.plan import Plan
from wanduet.errors import CancelledError, WanduetError
from wanduet.request import ResolvedRequest
from wanduet.sampling.denoise import OnStep, Watch

Phase = Literal["load", "encode", "denoise", "decode", "done", "failed"]
TIMING_NAMES = ("load_s", "prepare_s", "encode_s", "denoise_s", "decode_s", "write_s", "total_s")


@dataclass(frozen=True, slots=True)
class Event:
    """Progress of a job: `done` of `total` units of a phase (tokens, steps, frames), for one of its videos."""

    phase: Phase
    done: int = 0
    total: int = 0
    video: int = 0
    seconds_left: float | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """Where and how a job's videos are written."""

    path: Path
    codec: str = "h264"
    quality: int | None = None
    save_latents: bool = False
    resume: bool = False

    def video_path(self, index: int, count: int) -> Path:
        """The path of video `index` of `count`: `name.mp4`, or `name-2.mp4` where there are several."""
        return self.path if count == 1 else self.path.with_stem(f"{self.path.stem}-{index + 1}")

    def latents_path(self, index: int, count: int) -> Path:
        """Where that video's latents are kept until it is written."""
        return Path(f"{self.video_path(index, count)}.latents.safetensors")


@dataclass(frozen=True, slots=True)
class VideoResult:
    """One finished video."""

    path: Path
    seed: int
    num_frames: int
    latents_path: Path | None
    provenance: dict[str, Any]


@dataclass(frozen=True, slots=True)
class JobResult:
    """A finished job: its videos, how long each phase took, what it used.

    Seconds: `load_s` may pass beside `encode_s`. `prepare_s` is what the job waited for kernels to be compiled and attention
    to be measured; both are kept, so it is long once on a machine.

    No videos: the latents are on the disk, and another worker decodes them.
    """

    videos: tuple[VideoResult, ...]
    timings: dict[str, float]
    peak_memory_bytes: dict[str, int]
    warnings: tuple[str, ...]


@dataclass(eq=False)
class Job:
    """A submitted request. Created by `Engine.submit`; safe to use from any thread."""

    request: ResolvedRequest
    plan: Plan
    output: OutputOptions
    fallback: Plan | None = None  # what to do instead if a group of ranks cannot be kept together
    on_step: OnStep | None = None  # called after each step, in the denoising thread
    watch: Watch | None = None  # sees each step, wherever it is made
    elsewhere: Callable[[], bool] | None = None  # asked when latents are kept: whether another worker decodes them
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    timings: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TIMING_NAMES, 0.0))
    warnings: list[str] = field(default_factory=list)
    rungs: list[str] = field(default_factory=list)
    attention: str | None = None  # the back end that was used
    rank_peaks: dict[str, int] = field(default_factory=dict)  # bytes by device that processes of a group had at most
    denoised: dict[str, Any] | None = None  # the provenance of latents that were found, and not made by this job
    created: float = field(default_factory=time.perf_counter)
    _events: "queue.SimpleQueue[Event]" = field(default_factory=queue.SimpleQueue)
    _finished: threading.Event = field(default_factory=threading.Event)
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _result: JobResult | None = None
    _error: BaseException | None = None

    def cancel(self) -> None:
        """Ask the job to stop; it ends with CancelledError within a step or a chunk of frames."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    @property
    def finished(self) -> bool:
        """Whether the job has a result or an error."""
        return self._finished.is_set()

    def events(self) -> Iterator[Event]:
        """Progress as it happens; ends with the phase `done` or `failed`. For one consumer."""
        while True:
            try:
                event = self._events.get(timeout=0.5)  # wakes up so that Ctrl-C is heard on every system
            except queue.Empty:
                continue
            yield event
            if event.phase in ("done", "failed"):
                return

    def result(self, timeout: float | None = None) -> JobResult:
        """Wait for the videos. Raises what the job failed with, or TimeoutError."""
        if not self._finished.wait(timeout):
            raise TimeoutError(f"Job {self.id} has not finished after {timeout} s.")
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def video_path(self, index: int) -> Path:
        """Where video `index` goes."""
        return self.output.video_path(index, self.request.num_videos_per_prompt)

    def latents_path(self, index: int) -> Path:
        """Where its latents are kept until it is written."""
        return self.output.latents_path(index, self.request.num_videos_per_prompt)

    # The engine's side.

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the block's seconds to a timing, also when it fails."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add_time(name, time.perf_counter() - began)

    def emit(self, event: Event) -> None:
        """Publish progress."""
        self._events.put(event)

    def check_cancelled(self) -> None:
        """Raise CancelledError if `cancel` was called."""
        if self.cancelled:
            raise CancelledError("The job was cancelled.")

    def add_time(self, name: str, seconds: float) -> None:
        """Add to one of the timings."""
        self.timings[name] += seconds

    def found_latents(self, about: dict[str, Any]) -> None:
        """Take over what an earlier run says of the latents that it left, for this video's own provenance."""
        self.denoised = about
        self.attention = about.get("attention")
        self.rungs += [rung for rung in about.get("rungs", ()) if rung not in self.rungs]
        self.warnings += [warning for warning in about.get("warnings", ()) if warning not in self.warnings]
        for name in ("encode_s", "denoise_s"):  # each of a job's videos tells the sum so far
            self.timings[name] = max(self.timings[name], about.get("timings", {}).get(name, 0.0))

    def succeed(self, result: JobResult) -> None:
        """End the job with a result."""
        self._result = result
        self._finished.set()
        self.emit(Event("done"))

    def fail(self, error: BaseException) -> None:
        """End the job with an error; the first one counts."""
        if self.finished:
            return
        self._error = error
        self._finished.set()
        text = error.message if isinstance(error, WanduetError) else f"{type(error).__name__}: {error}"
        self.emit(Event("failed", message=text))
