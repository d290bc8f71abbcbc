"""A job as its owner sees it: events while it runs, a result, a way to cancel."""

import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from wanduet.errors import CancelledError, WanduetError
from wanduet.planning.plan import Plan
from wanduet.request import ResolvedRequest
from wanduet.sampling.denoise import OnStep, Watch

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


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """Where and how a job's videos are written. `taken`: the names are the caller's already (`media.names`); else the
    engine takes them while the job runs, so that no other engine or process writes the same file."""

    path: Path
    codec: str = "h264"
    quality: int | None = None
    save_latents: bool = False
    resume: bool = False
    taken: bool = False

    def __post_init__(self) -> None:
        """Take a path that is given as text. It becomes absolute: what the current folder is later does not matter."""
        path = Path(self.path)
        with suppress(OSError):  # without a current folder; whoever writes there says so
            path = path.absolute()
        object.__setattr__(self, "path", path)

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

    Seconds: `verify_s` is the hashing of weights, once on a machine. `load_s` may pass beside `encode_s`. `prepare_s` is what the job waited for kernels to be compiled and attention
    to be measured; both are kept, so it is long once on a machine.

    No videos: the latents are on the disk, and another worker decodes them.
    """

    videos: tuple[VideoResult, ...]
    timings: dict[str, float]
    peak_memory_bytes: dict[str, int]
    warnings: tuple[str, ...]


class Planned(Protocol):
    """Work that a plan was made for: a job, or one of its videos."""

    @property
    def id(self) -> str:
        """The job's."""

    @property
    def plan(self) -> Plan:
        """Where the work runs, and how."""

    @property
    def request(self) -> ResolvedRequest:
        """What is asked for."""

    @property
    def cancelled(self) -> bool:
        """Whether its owner wants it to stop."""

    def check_cancelled(self) -> None:
        """Raise CancelledError if its owner wants it to stop."""

    def wait(self, seconds: float) -> None:
        """Wait so long, or until its owner wants it to stop."""

    def add_time(self, name: str, seconds: float) -> None:
        """Add to one of its timings."""

    def note(self, event: str) -> None:
        """Record what did not go as it was planned."""


@dataclass(eq=False)
class Job:
    """A submitted request. Created by `Engine.submit`; safe to use from any thread.

    `plan` is the one that it was submitted with. What was done instead, where that was necessary, is in `rungs`.
    """

    request: ResolvedRequest
    plan: Plan
    output: OutputOptions
    fallback: Plan | None = None  # what to do instead if a group of ranks cannot be kept together
    on_step: OnStep | None = None  # called after each step, in the denoising thread
    watch: Watch | None = None  # sees each step, wherever it is made
    elsewhere: Callable[[], bool] | None = None  # asked when latents are kept: whether another worker decodes them
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    warnings: list[str] = field(default_factory=list)
    rank_peaks: dict[str, int] = field(default_factory=dict)  # bytes by device that processes of a group had at most
    created: float = field(default_factory=time.perf_counter)
    videos: "tuple[Video, ...]" = field(init=False)
    _timings: "Timings" = field(default_factory=lambda: Timings())  # of what is done once for all videos
    _events: "queue.SimpleQueue[Event]" = field(default_factory=queue.SimpleQueue)
    _finished: threading.Event = field(default_factory=threading.Event)
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _result: JobResult | None = None
    _error: BaseException | None = None

    def __post_init__(self) -> None:
        self.videos = tuple(Video(self, index, self.plan) for index in range(self.request.num_videos_per_prompt))

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

    @property
    def timings(self) -> dict[str, float]:
        """Seconds by phase: what is done once, and the sum over all videos."""
        return Timings.sum(self._timings, *(video.own_timings for video in self.videos))

    @property
    def rungs(self) -> list[str]:
        """What did not go as planned, video by video."""
        return [event for video in self.videos for event in video.rungs]

    @property
    def attention(self) -> str | None:
        """The attention back end of the video that was denoised last."""
        return next((video.attention for video in reversed(self.videos) if video.attention is not None), None)

    def events(self) -> Iterator[Event]:
        """Progress as it happens; ends with the phase `done` or `failed`. Of several consumers each gets some of it, and
        the end."""
        while True:
            try:
                event = self._events.get(timeout=0.5)  # wakes up so that every system delivers a Ctrl-C
            except queue.Empty:
                continue
            is_last = event.phase in ("done", "failed")
            if is_last:
                self._events.put(event)
            yield event
            if is_last:
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
        with self._timings.timed(name):
            yield

    def emit(self, event: Event) -> None:
        """Publish progress."""
        self._events.put(event)

    def check_cancelled(self) -> None:
        """Raise CancelledError if `cancel` was called."""
        if self.cancelled:
            raise CancelledError("The job was cancelled.")

    def wait(self, seconds: float) -> None:
        """Wait so long, or until `cancel` is called."""
        self._cancelled.wait(seconds)

    def add_time(self, name: str, seconds: float) -> None:
        """Add to the timings of what is done once for all videos; from any thread."""
        self._timings.add(name, seconds)

    def note(self, event: str) -> None:
        """Record what did not go as planned, where that concerns no single video: with the first one."""
        self.videos[0].note(event)

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


class Video:
    """One of a job's videos, and the record of how it was made. One stage at a time works on it, and changes it."""

    def __init__(self, job: Job, index: int, plan: Plan) -> None:
        self.job, self.index = job, index
        self.plan = plan  # the job's, until something forces a smaller one
        self.rungs: list[str] = []  # what did not go as planned
        self.attention: str | None = None  # the back end that was used
        self.kernels: str | None = None  # of the transformer, as `kernels.select` names them
        self.vae_kernels: str | None = None
        self.denoised: dict[str, Any] | None = None  # the provenance of latents that were found, not made by this job
        self.changed = False  # whether a callback has changed the latents
        self.own_timings = Timings()

    @property
    def id(self) -> str:
        """The job's."""
        return self.job.id

    @property
    def request(self) -> ResolvedRequest:
        """The job's."""
        return self.job.request

    @property
    def seed(self) -> int:
        """Its own: consecutive videos have consecutive seeds."""
        return self.job.request.seed + self.index

    @property
    def path(self) -> Path:
        """Where it goes."""
        return self.job.video_path(self.index)

    @property
    def latents_path(self) -> Path:
        """Where its latents are kept until it is written."""
        return self.job.latents_path(self.index)

    @property
    def timings(self) -> dict[str, float]:
        """Seconds by phase: its own, and what was done once for all of the job's videos."""
        return Timings.sum(self.job._timings, self.own_timings)

    @property
    def cancelled(self) -> bool:
        """Whether the job was cancelled."""
        return self.job.cancelled

    def check_cancelled(self) -> None:
        """Raise CancelledError if the job was cancelled."""
        self.job.check_cancelled()

    def wait(self, seconds: float) -> None:
        """Wait so long, or until the job is cancelled."""
        self.job.wait(seconds)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the block's seconds to one of its timings, also when it fails."""
        with self.own_timings.timed(name):
            yield

    def add_time(self, name: str, seconds: float) -> None:
        """Add to a timing: a model's loading to the job's, for all videos use it."""
        (self.job._timings if name == "load_s" else self.own_timings).add(name, seconds)

    def note(self, event: str) -> None:
        """Record what did not go as planned."""
        self.rungs.append(event)

    def found_latents(self, about: dict[str, Any]) -> None:
        """Take over what an earlier run says of the latents that it left, for this video's own provenance."""
        if self.denoised is not None:  # they were found before
            return
        self.denoised = about
        self.attention = about.get("attention")
        self.changed = bool(about.get("engine", {}).get("callback"))
        self.rungs += [event for event in about.get("rungs", ()) if event not in self.rungs]
        self.job.warnings += [one for one in about.get("warnings", ()) if one not in self.job.warnings]
        before = about.get("timings", {})
        self.own_timings.add("denoise_s", before.get("denoise_s", 0.0))
        self.job._timings.at_least("encode_s", before.get("encode_s", 0.0))  # each video tells the same


class Timings:
    """Seconds by phase; from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = dict.fromkeys(TIMING_NAMES, 0.0)

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
