"""A submitted job: progress events, the result, and cancellation."""

import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from wanduet.errors import CancelledError, WanduetError
from wanduet.planning.plan import Plan
from wanduet.request import ResolvedRequest
from wanduet.runtime.context import Event, RunContext, Timings
from wanduet.sampling.denoise import OnStep, Watch
from wanduet.sampling.predictor import OnPredict
from wanduet.stages.record import VideoRecord


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """Where and how a job's videos are written.

    `codec`, `quality`: see `media.video`. `save_latents` keeps the latents beside each video. `resume` reuses
    checkpoints, latents and videos of earlier runs with the same settings. `taken`: pass True if the caller has
    reserved the file names (`media.names`); else the engine reserves them while the job runs, so that no other engine
    or process writes the same file.
    """

    path: Path
    codec: str = "h264"
    quality: int | None = None
    save_latents: bool = False
    resume: bool = False
    taken: bool = False

    def __post_init__(self) -> None:
        """Convert `path` from text if needed, and make it absolute, so that a later change of folder has no effect."""
        path = Path(self.path)
        with suppress(OSError):  # the current folder is gone; writing the file raises the error
            path = path.absolute()
        object.__setattr__(self, "path", path)

    def video_path(self, index: int, count: int) -> Path:
        """Return the path of video `index` of `count`: `name.mp4`, or for several videos `name-1.mp4`, `name-2.mp4`."""
        return self.path if count == 1 else self.path.with_stem(f"{self.path.stem}-{index + 1}")

    def latents_path(self, index: int, count: int) -> Path:
        """Return the path of that video's saved latents."""
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
    """A finished job: its videos, seconds by phase, peak memory by device, and warnings.

    `timings`: `verify_s` is the hashing of weights, once per machine. `load_s` may overlap `encode_s`. `prepare_s` is
    the wait for kernels to compile and attention to be measured; both results are stored, so it is long only once per
    machine.

    `videos` is empty if the decode was left to another worker; the latents are saved then.
    """

    videos: tuple[VideoResult, ...]
    timings: dict[str, float]
    peak_memory_bytes: dict[str, int]
    warnings: tuple[str, ...]


@dataclass(eq=False)
class Job:
    """A submitted request, created by `Engine.submit`. Its methods may be called from any thread.

    `plan` is the plan at submission; `notes` lists the deviations from it.
    """

    request: ResolvedRequest
    plan: Plan
    output: OutputOptions
    fallback: Plan | None = None  # the plan without a group of ranks, used if the group fails
    on_step: OnStep | None = None  # called after each step, in the denoising thread; may replace the latents
    watch: Watch | None = None  # called after each step, also of a group of ranks; only sees the latents
    on_predict: OnPredict | None = None  # called after each prediction, in the denoising thread; only sees it
    decode: bool = True  # False: the job ends with its latents
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    warnings: list[str] = field(default_factory=list)
    rank_peaks: dict[str, int] = field(default_factory=dict)  # peak bytes by device of a group's processes
    created: float = field(default_factory=time.perf_counter)
    videos: "tuple[Video, ...]" = field(init=False)
    _timings: Timings = field(default_factory=Timings)  # of the work done once for all videos
    _events: "queue.SimpleQueue[Event]" = field(default_factory=queue.SimpleQueue)
    _finished: threading.Event = field(default_factory=threading.Event)
    _cancelled: threading.Event = field(default_factory=threading.Event)
    forget: Callable[[], None] | None = None  # by which the engine forgets a job that ends while it waits
    _guard: threading.Lock = field(default_factory=threading.Lock)  # for `_stages`, and for ending while there are none
    _stages: int = 0  # that work on it now
    _result: JobResult | None = None
    _error: BaseException | None = None

    def __post_init__(self) -> None:
        self.videos = tuple(Video(self, index, self.plan) for index in range(self.request.num_videos_per_prompt))

    def cancel(self) -> None:
        """Cancel the job. It ends with CancelledError within one step or one chunk of frames; at once if it waits for others."""
        self._cancelled.set()
        self._end_if_it_waits()

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
        """Seconds by phase: the work done once for all videos, plus the sum over the videos."""
        return Timings.sum(self._timings, *(video.record.timings for video in self.videos))

    @property
    def notes(self) -> list[str]:
        """The deviations from the plan, video by video."""
        return [event for video in self.videos for event in video.record.notes]

    @property
    def attention(self) -> str | None:
        """The attention back end of the video denoised last."""
        return next((made for video in reversed(self.videos) if (made := video.record.attention) is not None), None)

    def events(self) -> Iterator[Event]:
        """Yield progress events as they happen; the last has phase `done` or `failed`. Several consumers share the
        events: each gets some of them, and all get the last."""
        while True:
            try:
                event = self._events.get(timeout=0.5)  # not for ever: some systems deliver a Ctrl-C only between waits
            except queue.Empty:
                continue
            is_last = event.phase in ("done", "failed")
            if is_last:
                self._events.put(event)
            yield event
            if is_last:
                return

    def result(self, timeout: float | None = None) -> JobResult:
        """Wait for the result, at most `timeout` seconds (None: no limit). Raises the job's error, or TimeoutError."""
        if not self._finished.wait(timeout):
            raise TimeoutError(f"Job {self.id} has not finished after {timeout} s.")
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def video_path(self, index: int) -> Path:
        """Return the path of video `index`."""
        return self.output.video_path(index, self.request.num_videos_per_prompt)

    def latents_path(self, index: int) -> Path:
        """Return the path of that video's saved latents."""
        return self.output.latents_path(index, self.request.num_videos_per_prompt)

    # For the engine.

    def emit(self, event: Event) -> None:
        """Publish a progress event."""
        self._events.put(event)

    def check_cancelled(self) -> None:
        """Raise CancelledError if `cancel` was called."""
        if self.cancelled:
            raise CancelledError("The job was cancelled.")

    @cached_property
    def context(self) -> RunContext:
        """The context of work done once for all videos."""
        return RunContext(
            self.id, self.emit, self._cancelled.is_set, self.wait, self.add_time, self.videos[0].record.note
        )

    def wait(self, seconds: float) -> None:
        """Wait so many seconds, or until `cancel` is called."""
        self._cancelled.wait(seconds)

    def add_time(self, name: str, seconds: float) -> None:
        """Add to a timing of the work done once for all videos; from any thread."""
        self._timings.add(name, seconds)

    def enter(self) -> bool:
        """Begin a stage's work; `leave` must follow. Return False, and begin nothing, if the job has ended."""
        with self._guard:
            self._stages += not self.finished
            return not self.finished

    def leave(self) -> None:
        """End a stage's work."""
        with self._guard:
            self._stages -= 1
        self._end_if_it_waits()

    def _end_if_it_waits(self) -> None:
        """If the job is cancelled and no stage works on it, end it now: the stage that it waits for may take long."""
        with self._guard:
            if self.cancelled and not self.finished and not self._stages and self.forget is not None:
                self.forget()
                self.fail(CancelledError("The job was cancelled."))

    def succeed(self, result: JobResult) -> None:
        """End the job with a result."""
        self._result = result
        self._finished.set()
        self.emit(Event("done"))

    def fail(self, error: BaseException) -> None:
        """End the job with an error. Does nothing if it has ended."""
        if self.finished:
            return
        self._error = error
        self._finished.set()
        text = error.message if isinstance(error, WanduetError) else f"{type(error).__name__}: {error}"
        self.emit(Event("failed", message=text))


class Video:
    """One video of a job: its plan, its files, and the record of how it was made. Only one stage at a time uses it."""

    def __init__(self, job: Job, index: int, plan: Plan) -> None:
        self.job, self.index = job, index
        self.plan = plan  # the job's, until a fallback replaces it
        # Consecutive videos have consecutive seeds.
        self.record = VideoRecord(index, job.request.seed + index)
        self.denoised: dict[str, Any] | None = None  # the provenance of reused latents, which another run made

    @property
    def id(self) -> str:
        """The job's id."""
        return self.job.id

    @property
    def request(self) -> ResolvedRequest:
        """The job's request."""
        return self.job.request

    @property
    def seed(self) -> int:
        """The seed of this video."""
        return self.record.seed

    @property
    def path(self) -> Path:
        """The path of the video file."""
        return self.job.video_path(self.index)

    @property
    def latents_path(self) -> Path:
        """The path of the saved latents."""
        return self.job.latents_path(self.index)

    @property
    def timings(self) -> dict[str, float]:
        """Seconds by phase: of this video, plus the work done once for all videos of the job."""
        return Timings.sum(self.job._timings, self.record.timings)

    @cached_property
    def context(self) -> RunContext:
        """The context of work on this video."""
        return replace(self.job.context, add_time=self._add_time, note=self.record.note)

    def _add_time(self, name: str, seconds: float) -> None:
        """Add to a timing of this video; `load_s` goes to the job's, since all videos use the loaded model."""
        (self.job._timings if name == "load_s" else self.record.timings).add(name, seconds)

    def reuse_latents(self, about: dict[str, Any]) -> None:
        """Copy the provenance of reused latents into this video's record. `about`: the metadata of the latents file."""
        if self.denoised is not None:  # copied before
            return
        record, before = self.record, about.get("timings", {})
        self.denoised = about
        record.attention = about.get("attention")
        record.kernels = about.get("engine", {}).get("kernels")
        record.changed = bool(about.get("engine", {}).get("callback"))
        record.skipped_steps = list(about.get("skipped_steps", ()))
        record.quantized_layers = about.get("quantized_layers", 0)
        record.notes += [event for event in about.get("rungs", ()) if event not in record.notes]
        self.job.warnings += [one for one in about.get("warnings", ()) if one not in self.job.warnings]
        record.timings.add("denoise_s", before.get("denoise_s", 0.0))
        self.job._timings.at_least("encode_s", before.get("encode_s", 0.0))  # the same in each video's metadata
