"""The engine: jobs go in, videos come out, and three stages work on different jobs at once.

While job N is decoded and written, N+1 is denoised and N+2's text is encoded. Stages are threads joined
by queues of one; each models' lock keeps two stages off one device when the plan says they must not share.
"""

import logging
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from wanduet.config import EngineConfig
from wanduet.engine import generate
from wanduet.engine.build import Models
from wanduet.engine.denoising import Conditioning
from wanduet.engine.job import Job, JobResult, OutputOptions, Video, VideoResult
from wanduet.engine.trace import Trace
from wanduet.errors import CancelledError, OutOfMemoryError, OutputError, WanduetError
from wanduet.media.codecs import container_for
from wanduet.media.files import check_place, check_writable
from wanduet.media.names import Taken, take_given
from wanduet.media.video import VideoSpec
from wanduet.planning.hardware import Hardware, detect
from wanduet.planning.plan import Plan, require_fit
from wanduet.planning.planner import make_plan
from wanduet.request import GenerationRequest, ResolvedRequest
from wanduet.runtime.release import forget_traceback, release_memory, trim_cache
from wanduet.sampling.checkpoint import remove_abandoned
from wanduet.sampling.denoise import OnStep, Watch

log = logging.getLogger(__name__)

ABANDONED_DAYS = 30  # a denoise that was broken off and not resumed for so long is forgotten


@dataclass(frozen=True, slots=True)
class Denoised:
    """What the denoise hands to the decode: one of a job's videos, or the whole of it where it was made before."""

    video: Video
    latents: Tensor | VideoResult


@dataclass(slots=True)
class _Decoding:
    """What the decode has of a job so far; only its thread touches it."""

    results: list[VideoResult] = field(default_factory=list)
    waiting: list[Denoised] = field(
        default_factory=list
    )  # latents that another worker is to decode, until all are there
    names: Taken = field(default_factory=Taken)  # of its videos, given back when it ends


class Engine:
    """Runs requests on this machine. Models are loaded at the first job and kept until `close`.

    Use as a context manager, or call `close`; jobs still running then are cancelled.

    Of the process's settings, those of float32 precision and the allocator's share are set around the work and put back.
    What stays: PyTorch's CUDA allocator may grow its blocks, and, unless they are set, variables of the environment that
    say where flash-attn-4 and quack keep kernels (FLASH_ATTENTION_CUTE_DSL_CACHE_*, QUACK_CACHE_DIR). A job that begins
    resets PyTorch's and the system's counters of peak memory.
    """

    def __init__(self, config: EngineConfig, hardware: Hardware | None = None) -> None:
        self.config = config
        self.hardware = hardware or detect()
        self.models = Models(config)
        self.trace = Trace()
        self._to_encode: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._to_denoise: queue.Queue[tuple[Job, Conditioning] | None] = queue.Queue(maxsize=1)
        self._to_decode: queue.Queue[Denoised | None] = queue.Queue(maxsize=1)
        self._guard = threading.Lock()  # a job is queued before the engine closes, or not at all
        self._closing = threading.Lock()
        self._open: dict[Job, _Decoding] = {}
        self._threads = [
            threading.Thread(target=stage, name=f"wanduet-{name}", daemon=True)
            for name, stage in (("encode", self._encode), ("denoise", self._denoise), ("decode", self._decode))
        ]
        self._started = False
        self._closed = False

    def plan(self, request: GenerationRequest) -> Plan:
        """What would run where, without loading anything."""
        return self._plan(request.resolve(self.models.spec))

    def submit(
        self,
        request: GenerationRequest,
        output: OutputOptions,
        on_step: OnStep | None = None,
        watch: Watch | None = None,
        elsewhere: Callable[[], bool] | None = None,
    ) -> Job:
        """Check, plan and queue a request. `on_step` is called after each step and may change the latents; `watch`
        only sees them, and so may look at what other processes do. `elsewhere` is asked when latents are on the
        disk; if another worker decodes them, the job ends there, with no videos in its result.

        Raises InvalidRequestError, DoesNotFitError or OutputError before anything is loaded, CancelledError if the
        engine is closed, also where that happens meanwhile. OutputError also where a job that has not ended, of this
        engine or of another program, writes one of the files.
        """
        if not isinstance(request, GenerationRequest) or not isinstance(output, OutputOptions):
            raise TypeError(
                "submit takes a GenerationRequest and OutputOptions, for example OutputOptions('clip.mp4')."
            )
        self._check_open()
        resolved = request.resolve(self.models.spec)
        plan = self._plan(resolved)
        if on_step is not None and (alone := self._fallback(resolved, plan)) is not None:
            plan = alone  # a callback cannot follow the work into other processes
        require_fit(plan, resolved)
        count = resolved.num_videos_per_prompt
        for index in range(count):
            check_place(output.video_path(index, count))
            check_place(output.latents_path(index, count))  # whose name is longer
        check_writable(output.video_path(0, count), generate.bytes_on_disk(resolved, self.models.spec))
        container_for(output.path, output.codec)
        VideoSpec(resolved.height, resolved.width, resolved.fps, output.codec, output.quality)
        job = Job(resolved, plan, output, self._fallback(resolved, plan), on_step, watch, elsewhere)
        with self._guard:
            self._check_open()
            self._check_free(job)
            names = Taken() if output.taken else take_given(video.path for video in job.videos)
            try:
                self._start()
            except BaseException:
                names.release()
                raise
            self._open[job] = _Decoding(names=names)
            self._to_encode.put(job)
        return job

    def is_finished(self, request: GenerationRequest, output: OutputOptions) -> bool:
        """Whether an earlier run has finished all of a request's videos with the settings that this engine would use."""
        resolved = request.resolve(self.models.spec)
        job = Job(resolved, self._plan(resolved), replace(output, resume=True))
        return all(generate.finished_video(self.models, video) is not None for video in job.videos)

    def _check_open(self) -> None:
        if self._closed:
            raise CancelledError("The engine is closed.", hint="Make a new one.")

    def _start(self) -> None:
        """Start the stages. Raises RuntimeError where the system has no more threads; the next job tries again."""
        if self._started:
            return
        remove_abandoned(self.config.data_folder / "checkpoints", ABANDONED_DAYS)
        for thread in self._threads:
            if thread.ident is None:
                thread.start()
        self._started = True

    def _check_free(self, job: Job) -> None:
        """Refuse a job that would write a file which another one writes: one of the two videos would be lost."""
        wanted = _files_of(job)
        for other in self._open:
            if both := wanted.keys() & _files_of(other).keys():
                raise OutputError(
                    f"Cannot write {wanted[min(both)]}: another job of this engine, which has not ended, writes it.",
                    hint="Give each job a path of its own, or wait for that job's result first.",
                )

    def _plan(self, request: ResolvedRequest) -> Plan:
        return make_plan(request, self.models.memory, self.config, self.hardware)

    def _fallback(self, request: ResolvedRequest, plan: Plan) -> Plan | None:
        """The plan without a group of ranks, where a group was the engine's own idea."""
        if plan.strategy != "parallel" or self.config.strategy == "parallel":
            return None
        found = make_plan(request, self.models.memory, replace(self.config, strategy="placed"), self.hardware)
        return found if found.prediction.fits else None

    def close(self) -> None:
        """Cancel what runs, end the threads, give all memory back. Another call, from any thread, waits for the first.

        Raises RuntimeError in a callback of a job: that is a thread which must end first.
        """
        if threading.current_thread() in self._threads:
            raise RuntimeError("An engine cannot be closed by a callback of its own job; cancel the job there.")
        with self._closing:
            if self._closed:
                return
            with self._guard:  # no job is queued behind the None
                self._closed = True
                for job in self._open:
                    job.cancel()
                self._to_encode.put(None)
            self.models.stop_loading()
            for thread in self._threads:
                if thread.ident is not None:
                    thread.join()
            self.models.unload()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The stages. Each ends its thread on None and hands None on. None refers to a job while it waits for the next.

    def _encode(self) -> None:
        while (job := self._to_encode.get()) is not None:
            self._attempt(job, partial(self._encode_job, job))
            del job
        self._to_denoise.put(None)

    def _encode_job(self, job: Job) -> None:
        if len(self._open) == 1:  # else the memory is another job's, too
            trim_cache({device.name: device.peak for device in job.plan.prediction.devices})
        self.models.peaks.begin(job.id)
        latents = generate.kept_latents(self.models, job)
        if latents is not None:  # neither text encoder nor transformer is needed
            self._decode_here(job, latents)
            return
        self.models.verify_weights(job)
        with self.trace.span("encode", job):
            self.models.preload(job)
            conditioning = generate.encode_prompt(self.models, job)
        self._to_denoise.put((job, conditioning))

    def _denoise(self) -> None:
        while (item := self._to_denoise.get()) is not None:
            self._denoise_job(*item)
            del item
        self._to_decode.put(None)

    def _denoise_job(self, job: Job, conditioning: Conditioning) -> None:
        plan = job.plan
        for video in job.videos:
            if plan.strategy != video.plan.strategy:  # the group could not be kept together for the video before
                video.plan = plan
            self._attempt(job, partial(self._denoise_video, video, conditioning))
            plan = video.plan

    def _denoise_video(self, video: Video, conditioning: Conditioning) -> None:
        finished = generate.finished_video(self.models, video)
        if finished is not None:
            self._to_decode.put(Denoised(video, finished))
            return
        with self.trace.span("denoise", video.job):
            latents = generate.denoise_video(self.models, video, conditioning)
        self._to_decode.put(Denoised(video, latents))

    def _decode(self) -> None:
        while (item := self._to_decode.get()) is not None:
            self._attempt(item.video.job, partial(self._decode_video, item))
            del item

    def _decode_here(self, job: Job, latents: Iterable[Tensor]) -> None:
        """What was found is not left to another worker again."""
        job.elsewhere = None
        for video, one in zip(job.videos, latents, strict=True):
            self._to_decode.put(Denoised(video, one))

    def _decode_video(self, item: Denoised) -> None:
        job = item.video.job
        decoding = self._open.get(job)
        if decoding is None:  # another of its videos has failed meanwhile
            return
        waiting, results = decoding.waiting, decoding.results
        waiting.append(item)
        # Whoever said no once is not asked again; whoever said yes is, for it must still hold at the last video. Asked
        # here, where the answer, which may first copy the latents to others, keeps no transformer waiting.
        asked = job.elsewhere is not None and (item.video.index == 0 or len(waiting) > 1)
        # A finished video has no latents to give.
        asked = asked and not any(isinstance(one.latents, VideoResult) for one in waiting)
        if asked and job.elsewhere is not None and job.elsewhere():
            if len(waiting) == len(job.videos):
                self._succeed(job, ())
            return
        for one in waiting:
            if isinstance(one.latents, VideoResult):
                results.append(one.latents)
                continue
            with self.trace.span("decode", job):
                results.append(generate.decode_video(self.models, one.video, one.latents))
        waiting.clear()
        if len(results) == len(job.videos):
            self._succeed(job, tuple(results))

    def _succeed(self, job: Job, videos: tuple[VideoResult, ...]) -> None:
        job.add_time("total_s", time.perf_counter() - job.created)
        peaks = self.models.peaks.end(job.id, job.rank_peaks)
        result = JobResult(videos, job.timings, peaks, tuple(job.warnings))
        self._forget(job)
        job.succeed(result)

    def _attempt(self, job: Job, work: Callable[[], None]) -> None:
        """Do a stage's work for a job; an error ends that job and leaves the stage ready for the next."""
        if job.finished:  # another of its videos has failed
            return
        try:
            job.check_cancelled()
            work()
        except BaseException as error:
            self._forget(job)
            shown = _memory_ran_out(error) or error
            try:
                self._clear_away(job, error, unexpected=not isinstance(shown, WanduetError))
            finally:
                job.fail(shown)

    def _clear_away(self, job: Job, error: BaseException, unexpected: bool) -> None:
        """Nothing of a failure stays on the devices. What nobody expected is logged first, with where it happened, as
        text: whatever keeps log records would else keep the frames, and the tensors in them."""
        if unexpected and not job.finished:
            log.error("Job %s failed.\n%s", job.id, "".join(traceback.format_exception(error)).rstrip())
        forget_traceback(error)
        with suppress(Exception):  # a device that has failed cannot even do that
            release_memory()

    def _forget(self, job: Job) -> None:
        self.models.peaks.forget(job.id)
        with self._guard:
            decoding = self._open.pop(job, None)
        if decoding is not None:
            decoding.names.release()


def _files_of(job: Job) -> dict[str, Path]:
    """What a job writes, by a name that is the same however a path leads there."""
    paths = [path for video in job.videos for path in (video.path, video.latents_path)]
    return {os.path.normcase(path.parent.resolve() / path.name): path for path in paths}


def _memory_ran_out(error: BaseException) -> OutOfMemoryError | None:
    """What a user reads where memory ran out and there was nothing smaller to try; None for any other error."""
    if isinstance(error, torch.OutOfMemoryError):
        where, limit = "A device", "--vram-limit"
    elif isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)):
        where, limit = "The host", "--ram-limit"
    else:
        return None
    problem = f" ({said})" if (said := str(error).split(". ")[0]) else ""
    return OutOfMemoryError(
        f"{where} ran out of memory{problem}.",
        hint=f"Another program may use it: `wanduet doctor` says what is free. {limit} makes a smaller plan; "
        "--resume goes on from the last checkpoint.",
    )
