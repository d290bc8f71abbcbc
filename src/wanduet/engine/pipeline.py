"""The engine: takes jobs, makes videos, with three stages that work on different jobs at the same time.

While job N is decoded and written, N+1 is denoised and the text of N+2 is encoded. The stages are threads connected by
queues of length one. Device locks (`runtime.leases`) prevent two stages from using one device at a time.
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
from typing import Self

import torch
from torch import Tensor

from wanduet.config import EngineConfig
from wanduet.engine import generate
from wanduet.engine.group import EngineModels
from wanduet.engine.job import Job, JobResult, OutputOptions, Video, VideoResult
from wanduet.engine.trace import Trace
from wanduet.errors import CancelledError, InvalidRequestError, OutOfMemoryError, OutputError, WanduetError
from wanduet.family.step_caches import OFF
from wanduet.media.codecs import container_for
from wanduet.media.files import check_place, check_writable
from wanduet.media.input_video import check_is_file
from wanduet.media.names import Taken, take_given
from wanduet.media.video import VideoSpec
from wanduet.planning.hardware import Hardware, detect
from wanduet.planning.plan import Plan, require_fit
from wanduet.request import GenerationRequest, ResolvedRequest
from wanduet.runtime.release import forget_traceback, release_memory, trim_cache
from wanduet.sampling.checkpoint import remove_abandoned
from wanduet.sampling.denoise import OnStep, Watch
from wanduet.sampling.predictor import OnPredict
from wanduet.schedule import few_step_warnings
from wanduet.stages.task import Conditions

log = logging.getLogger(__name__)

ABANDONED_DAYS = 30  # checkpoints that are not resumed for this long are deleted


@dataclass(frozen=True, slots=True)
class Denoised:
    """The output of the denoise stage: a video with its latents, or with its result if an earlier run finished it."""

    video: Video
    latents: Tensor | VideoResult


@dataclass(slots=True)
class _Decoding:
    """The state of a job in the decode stage. Only that stage's thread changes `results`."""

    results: list[VideoResult | None] = field(default_factory=list)
    names: Taken = field(default_factory=Taken)  # the reserved names of its videos, released when it ends


class Engine:
    """Runs requests on this machine. Loads models at the first job and keeps them until `close`.

    Use it as a context manager, or call `close`; jobs still running then are cancelled.

    Of the process's settings, the engine changes float32 precision and the allocator's memory fraction around its work,
    and restores them. Two changes stay: PyTorch's CUDA allocator uses expandable segments, and, unless they are set,
    the environment variables for the kernel caches of flash-attn-4 and quack (FLASH_ATTENTION_CUTE_DSL_CACHE_*,
    QUACK_CACHE_DIR) are set. Each job resets PyTorch's and the system's counters of peak memory when it begins.
    """

    def __init__(self, config: EngineConfig, hardware: Hardware | None = None) -> None:
        if not isinstance(config, EngineConfig):
            raise TypeError("Engine takes an EngineConfig, for example EngineConfig(model='miniature').")
        self.config = config
        self.hardware = hardware or detect()
        self.models = EngineModels(config)
        self.trace = Trace()
        self._to_encode: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._to_denoise: queue.Queue[tuple[Job, Conditions] | None] = queue.Queue(maxsize=1)
        self._to_decode: queue.Queue[Denoised | None] = queue.Queue(maxsize=1)
        self._guard = threading.Lock()  # for `_open` and `_closed`: no job is queued after the engine closes
        self._closing = threading.Lock()
        self._open: dict[Job, _Decoding] = {}
        self._threads = [
            threading.Thread(target=stage, name=f"wanduet-{name}", daemon=True)
            for name, stage in (("encode", self._encode), ("denoise", self._denoise), ("decode", self._decode))
        ]
        self._started = False
        self._closed = False

    def plan(self, request: GenerationRequest) -> Plan:
        """Return the plan of a request, without loading anything."""
        return self._plan(self.models.resolve(request))

    def submit(
        self,
        request: GenerationRequest,
        output: OutputOptions | str | Path,
        on_step: OnStep | None = None,
        watch: Watch | None = None,
        on_predict: OnPredict | None = None,
        decode: bool = True,
    ) -> Job:
        """Check, plan and queue a request. `output`: a path alone is that of an H.264 video.

        `on_step` is called after each step and may change the latents; it does not work with a group of ranks. `watch`
        is called too, but only sees the latents, and works with a group. `on_predict` is called after each prediction of
        velocities, unless a group of ranks makes them. `decode` False: the job ends with its latents, and no videos.

        Raises InvalidRequestError, DoesNotFitError or OutputError before anything is loaded, and CancelledError if the
        engine is closed or closes meanwhile. It also raises OutputError if an unfinished job, of this engine or of
        another program, writes one of the files.
        """
        output = OutputOptions(Path(output)) if isinstance(output, str | Path) else output
        if not isinstance(request, GenerationRequest) or not isinstance(output, OutputOptions):
            raise TypeError(
                "submit takes a GenerationRequest and a path or OutputOptions, for example OutputOptions('clip.mp4')."
            )
        self._check_open()
        self._check_input(request)
        resolved = self.models.resolve(request)
        if on_step is not None and resolved.step_cache != OFF:
            allowed = f"{OFF} with on_step, which may change the latents that a step cache compares"
            raise InvalidRequestError("step_cache", resolved.step_cache, allowed, OFF)
        plan = self._plan(resolved)
        if on_step is not None and (without_group := self._fallback(resolved, plan)) is not None:
            plan = without_group  # a callback cannot run in the ranks' processes
        require_fit(plan, resolved)
        count = resolved.num_videos_per_prompt
        for index in range(count):
            check_place(output.video_path(index, count))
            _spare_input(resolved, output.video_path(index, count))
            check_place(output.latents_path(index, count))  # its name is longer
        check_writable(output.video_path(0, count), generate.bytes_on_disk(resolved, self.models.spec))
        container_for(output.path, output.codec)
        VideoSpec(resolved.height, resolved.width, resolved.fps, output.codec, output.quality)
        job = Job(resolved, plan, output, self._fallback(resolved, plan), on_step, watch, on_predict, decode)
        job.warnings += self.models.transformer.loras.warnings(resolved)
        job.warnings += few_step_warnings(
            resolved.model_dump(), self.models.transformer.loras.spec_for(resolved).defaults
        )
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
            job.forget = partial(self._forget, job)
            self._to_encode.put(job)
        return job

    def is_finished(self, request: GenerationRequest, output: OutputOptions) -> bool:
        """Return whether an earlier run finished all videos of a request with the settings that this engine would
        use."""
        resolved = self.models.resolve(request)
        job = Job(resolved, self._plan(resolved), replace(output, resume=True))
        return all(generate.finished_video(self.models, video) is not None for video in job.videos)

    def _check_input(self, request: GenerationRequest) -> None:
        """Raise InvalidRequestError if the pictures of an input video are needed, and are not there."""
        check_is_file(request)

    def _check_open(self) -> None:
        if self._closed:
            raise CancelledError("The engine is closed.", hint="Make a new one.")

    def _start(self) -> None:
        """Start the stages' threads once. Raises RuntimeError if the system has no more threads; the next job tries
        again."""
        if self._started:
            return
        remove_abandoned(self.config.data_folder / "checkpoints", ABANDONED_DAYS)
        for thread in self._threads:
            if thread.ident is None:
                thread.start()
        self._started = True

    def _check_free(self, job: Job) -> None:
        """Raise OutputError for a job that writes the same file as another unfinished job: one video would be lost."""
        wanted = _files_of(job)
        for other in self._open:
            if both := wanted.keys() & _files_of(other).keys():
                raise OutputError(
                    f"Cannot write {wanted[min(both)]}: another job of this engine, which has not ended, writes it.",
                    hint="Give each job a path of its own, or wait for that job's result first.",
                )

    def _plan(self, request: ResolvedRequest) -> Plan:
        return self.models.plan(request, self.config, self.hardware)

    def _fallback(self, request: ResolvedRequest, plan: Plan) -> Plan | None:
        """Return the plan without a group of ranks; None unless the planner chose the group and a fitting plan
        exists."""
        if plan.strategy != "parallel" or self.config.strategy == "parallel":
            return None
        found = self.models.plan(request, replace(self.config, strategy="placed"), self.hardware)
        return found if found.prediction.fits else None

    def close(self) -> None:
        """Cancel all jobs, end the threads and free all memory. A second call, from any thread, waits for the first.

        Raises RuntimeError if called by a job's callback: its thread would wait for its own end.
        """
        if threading.current_thread() in self._threads:
            raise RuntimeError("An engine cannot be closed by a callback of its own job; cancel the job there.")
        with self._closing:
            if self._closed:
                return
            with self._guard:  # no job is queued after the None
                self._closed = True
                jobs = tuple(self._open)
                self._to_encode.put(None)
            for job in jobs:
                job.cancel()
            self.models.transformer.stop_loading()
            for thread in self._threads:
                if thread.ident is not None:
                    thread.join()
            self.models.unload()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The stages. Each ends on None and passes it on. A stage that waits keeps no reference to its last job.

    def _encode(self) -> None:
        while (job := self._to_encode.get()) is not None:
            self._attempt(job, partial(self._encode_job, job))
            del job
        self._to_denoise.put(None)

    def _encode_job(self, job: Job) -> None:
        if len(self._open) == 1:  # else another job may need the cached memory
            trim_cache({device.name: device.peak for device in job.plan.prediction.devices})
        self.models.peaks.begin(job.id)
        latents = generate.kept_latents(self.models, job)
        if latents is not None:  # skip text encoder and transformer
            self._decode_here(job, latents)
            return
        self.models.checkpoint.verify(job.context)
        with self.trace.span("encode", job):
            self.models.preload(job.plan, job.request, job.context)
            conditions = generate.encode(self.models, job)
        self._to_denoise.put((job, conditions))

    def _denoise(self) -> None:
        while (item := self._to_denoise.get()) is not None:
            self._denoise_job(*item)
            del item
        self._to_decode.put(None)

    def _denoise_job(self, job: Job, conditions: Conditions) -> None:
        plan = job.plan
        for video in job.videos:
            if plan.strategy != video.plan.strategy:  # the group failed at the video before
                video.plan = plan
            self._attempt(job, partial(self._denoise_video, video, conditions))
            plan = video.plan

    def _denoise_video(self, video: Video, conditions: Conditions) -> None:
        finished = generate.finished_video(self.models, video)
        if finished is not None:
            self._to_decode.put(Denoised(video, finished))
            return
        with self.trace.span("denoise", video.job):
            latents = generate.denoise_video(self.models, video, conditions)
        self._to_decode.put(Denoised(video, latents))

    def _decode(self) -> None:
        while (item := self._to_decode.get()) is not None:
            self._attempt(item.video.job, partial(self._decode_video, item))
            del item

    def _decode_here(self, job: Job, latents: Iterable[Tensor]) -> None:
        """Queue saved latents for this engine's decode."""
        for video, one in zip(job.videos, latents, strict=True):
            self._to_decode.put(Denoised(video, one))

    def _decode_video(self, item: Denoised) -> None:
        job = item.video.job
        decoding = self._open.get(job)
        if decoding is None:  # another video of this job has failed meanwhile
            return
        made: VideoResult | None = None  # without a decode
        if isinstance(item.latents, VideoResult):  # an earlier run finished it
            made = item.latents
        elif job.decode:
            with self.trace.span("decode", job):
                made = generate.decode_video(self.models, item.video, item.latents)
        results = decoding.results
        results.append(made)
        if len(results) == len(job.videos):
            self._succeed(job, tuple(one for one in results if one is not None))

    def _succeed(self, job: Job, videos: tuple[VideoResult, ...]) -> None:
        job.add_time("total_s", time.perf_counter() - job.created)
        peaks = self.models.peaks.end(job.id, job.rank_peaks)
        result = JobResult(videos, job.timings, peaks, tuple(job.warnings))
        self._forget(job)
        job.succeed(result)

    def _attempt(self, job: Job, work: Callable[[], None]) -> None:
        """Run a stage's work for a job. An error ends that job; the stage goes on with the next."""
        if not job.enter():  # another video of this job has failed, or it was cancelled while it waited
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
        finally:
            job.leave()

    def _clear_away(self, job: Job, error: BaseException, unexpected: bool) -> None:
        """Free the device memory that an error's traceback keeps. Log an unexpected error first, with its traceback as
        text: a log record with the exception itself would keep the frames alive, and the tensors in them."""
        if unexpected and not job.finished:
            log.error("Job %s failed.\n%s", job.id, "".join(traceback.format_exception(error)).rstrip())
        forget_traceback(error)
        with suppress(Exception):  # raises on a failed device
            release_memory()

    def _forget(self, job: Job) -> None:
        self.models.peaks.forget(job.id)
        with self._guard:
            decoding = self._open.pop(job, None)
        job.forget = None
        if decoding is not None:
            decoding.names.release()


def _spare_input(request: ResolvedRequest, path: Path) -> None:
    """Raise OutputError if a video at `path` would replace the one that the request starts from."""
    with suppress(OSError):  # one of them does not exist
        if request.input_video is not None and os.path.samefile(path, request.input_video):
            raise OutputError(
                f"Cannot write {path}: it is the video to start from, which would be lost.",
                hint="Choose another place with --output.",
            )


def _files_of(job: Job) -> dict[str, Path]:
    """Return a job's files by resolved path, so that different paths to one file are equal."""
    paths = [path for video in job.videos for path in (video.path, video.latents_path)]
    return {os.path.normcase(path.parent.resolve() / path.name): path for path in paths}


def _memory_ran_out(error: BaseException) -> OutOfMemoryError | None:
    """Convert an out-of-memory error of PyTorch or Python to OutOfMemoryError; return None for any other error."""
    if isinstance(error, torch.OutOfMemoryError):
        where, limit = "A device", "--vram-limit"
    elif isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)):
        where, limit = "The host", "--ram-limit"
    else:
        return None
    problem = f" ({reason})" if (reason := str(error).split(". ")[0]) else ""
    return OutOfMemoryError(
        f"{where} ran out of memory{problem}.",
        hint=f"Another program may use it: `wanduet doctor` says what is free. {limit} makes a smaller plan; "
        "--resume goes on from the last checkpoint.",
    )
