"""A job as its owner sees it: events while it runs, a result, a way to cancel."""

import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from wanduet.errors import CancelledError, WanduetError
from wanduet.planning.plan import Plan
from wanduet.request import ResolvedRequest
from wanduet.runtime.context import Event, RunContext, Timings
from wanduet.sampling.denoise import OnStep, Watch
from wanduet.stages.record import VideoRecord


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
    _timings: Timings = field(default_factory=Timings)  # of what is done once for all videos
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
        return Timings.sum(self._timings, *(video.record.timings for video in self.videos))

    @property
    def rungs(self) -> list[str]:
        """What did not go as planned, video by video."""
        return [event for video in self.videos for event in video.record.rungs]

    @property
    def attention(self) -> str | None:
        """The attention back end of the video that was denoised last."""
        return next((made for video in reversed(self.videos) if (made := video.record.attention) is not None), None)

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

    @cached_property
    def context(self) -> RunContext:
        """For work that is done once for all videos."""
        return RunContext(
            self.id, self.emit, self._cancelled.is_set, self.wait, self.add_time, self.videos[0].record.note
        )

    def wait(self, seconds: float) -> None:
        """Wait so long, or until `cancel` is called."""
        self._cancelled.wait(seconds)

    def add_time(self, name: str, seconds: float) -> None:
        """Add to the timings of what is done once for all videos; from any thread."""
        self._timings.add(name, seconds)

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
    """One of a job's videos: its plan, its files, and the record of how it was made. One stage at a time works on it."""

    def __init__(self, job: Job, index: int, plan: Plan) -> None:
        self.job, self.index = job, index
        self.plan = plan  # the job's, until something forces a smaller one
        # Consecutive videos have consecutive seeds.
        self.record = VideoRecord(index, job.request.seed + index)
        self.denoised: dict[str, Any] | None = None  # the provenance of latents that were found, not made by this job

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
        """Its own."""
        return self.record.seed

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
        return Timings.sum(self.job._timings, self.record.timings)

    @cached_property
    def context(self) -> RunContext:
        """For work on this video."""
        return replace(self.job.context, add_time=self._add_time, note=self.record.note)

    def _add_time(self, name: str, seconds: float) -> None:
        """A model's loading counts for the job, for all videos use it."""
        (self.job._timings if name == "load_s" else self.record.timings).add(name, seconds)

    def found_latents(self, about: dict[str, Any]) -> None:
        """Take over what an earlier run says of the latents that it left, for this video's own provenance."""
        if self.denoised is not None:  # they were found before
            return
        record, before = self.record, about.get("timings", {})
        self.denoised = about
        record.attention = about.get("attention")
        record.changed = bool(about.get("engine", {}).get("callback"))
        record.rungs += [event for event in about.get("rungs", ()) if event not in record.rungs]
        self.job.warnings += [one for one in about.get("warnings", ()) if one not in self.job.warnings]
        record.timings.add("denoise_s", before.get("denoise_s", 0.0))
        self.job._timings.at_least("encode_s", before.get("encode_s", 0.0))  # each video tells the same
