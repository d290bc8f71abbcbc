"""The engine: jobs go in, videos come out, and three stages work on different jobs at once.

While job N is decoded and written, N+1 is denoised and N+2's text is encoded. Stages are threads joined
by queues of one; each models' lock keeps two stages off one device when the plan says they must not share.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Self

from torch import Tensor

from wanduet.config import EngineConfig
from wanduet.engine import generate
from wanduet.engine.build import Models
from wanduet.engine.denoising import Conditioning
from wanduet.engine.hardware import Hardware, detect
from wanduet.engine.job import Job, JobResult, OutputOptions, VideoResult
from wanduet.engine.plan import Plan, make_plan, require_fit
from wanduet.engine.trace import Trace
from wanduet.errors import CancelledError
from wanduet.media.codecs import container_for
from wanduet.media.files import check_writable
from wanduet.media.video import VideoSpec
from wanduet.request import GenerationRequest, ResolvedRequest
from wanduet.sampling.checkpoint import remove_abandoned
from wanduet.sampling.denoise import OnStep, Watch

ABANDONED_DAYS = 30  # a denoise that was broken off and not resumed for so long is forgotten


@dataclass(frozen=True, slots=True)
class Denoised:
    """What the denoise hands to the decode: one of a job's videos, or the whole of it where it was made before."""

    job: Job
    index: int
    latents: Tensor | VideoResult


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
        self._videos: dict[str, list[VideoResult]] = {}
        self._held: dict[str, list[Denoised]] = {}  # latents that another worker is to decode, until all are there
        self._open: set[Job] = set()
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

        Raises InvalidRequestError, DoesNotFitError or OutputError before anything is loaded.
        """
        if self._closed:
            raise CancelledError("The engine is closed.")
        resolved = request.resolve(self.models.spec)
        plan = self._plan(resolved)
        if on_step is not None and (alone := self._fallback(resolved, plan)) is not None:
            plan = alone  # a callback cannot follow the work into other processes
        require_fit(plan, resolved)
        check_writable(
            output.video_path(0, resolved.num_videos_per_prompt), generate.bytes_on_disk(resolved, self.models.spec)
        )
        container_for(output.path, output.codec)
        VideoSpec(resolved.height, resolved.width, resolved.fps, output.codec, output.quality)
        job = Job(resolved, plan, output, self._fallback(resolved, plan), on_step, watch, elsewhere)
        self._open.add(job)
        self._videos[job.id] = []
        self._held[job.id] = []
        if not self._started:
            self._started = True
            remove_abandoned(self.config.data_folder / "checkpoints", ABANDONED_DAYS)
            for thread in self._threads:
                thread.start()
        self._to_encode.put(job)
        return job

    def _plan(self, request: ResolvedRequest) -> Plan:
        return make_plan(request, self.models.memory, self.config, self.hardware)

    def _fallback(self, request: ResolvedRequest, plan: Plan) -> Plan | None:
        """The plan without a group of ranks, where a group was the engine's own idea."""
        if plan.strategy != "parallel" or self.config.strategy == "parallel":
            return None
        found = make_plan(request, self.models.memory, replace(self.config, strategy="placed"), self.hardware)
        return found if found.fits else None

    def close(self) -> None:
        """Cancel what runs, end the threads, free the models."""
        if self._closed:
            return
        self._closed = True
        for job in tuple(self._open):
            job.cancel()
        if self._started:
            self._to_encode.put(None)
            for thread in self._threads:
                thread.join()
        self.models.unload()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The stages. Each ends its thread on None and hands None on.

    def _encode(self) -> None:
        while (job := self._to_encode.get()) is not None:
            self._attempt(job, partial(self._encode_job, job))
        self._to_denoise.put(None)

    def _encode_job(self, job: Job) -> None:
        self.models.peaks.begin(job.id)
        latents = generate.kept_latents(self.models, job)
        if latents is not None:  # neither text encoder nor transformer is needed
            self._decode_here(job, latents)
            return
        with self.trace.span("encode", job):
            self.models.preload(job)
            conditioning = generate.encode_prompt(self.models, job)
        self._to_denoise.put((job, conditioning))

    def _denoise(self) -> None:
        while (item := self._to_denoise.get()) is not None:
            job, conditioning = item
            for index in range(job.request.num_videos_per_prompt):
                self._attempt(job, partial(self._denoise_video, job, index, conditioning))
        self._to_decode.put(None)

    def _denoise_video(self, job: Job, index: int, conditioning: Conditioning) -> None:
        finished = generate.finished_video(self.models, job, index)
        if finished is not None:
            self._to_decode.put(Denoised(job, index, finished))
            return
        with self.trace.span("denoise", job):
            latents = generate.denoise_video(self.models, job, index, conditioning)
        self._to_decode.put(Denoised(job, index, latents))

    def _decode(self) -> None:
        while (item := self._to_decode.get()) is not None:
            self._attempt(item.job, partial(self._decode_video, item))

    def _decode_here(self, job: Job, latents: Iterable[Tensor]) -> None:
        """What was found is not left to another worker again."""
        job.elsewhere = None
        for index, one in enumerate(latents):
            self._to_decode.put(Denoised(job, index, one))

    def _decode_video(self, item: Denoised) -> None:
        job, held = item.job, self._held[item.job.id]
        held.append(item)
        # Whoever said no once is not asked again; whoever said yes is, for it must still hold at the last video. Asked
        # here, where the answer, which may first copy the latents to others, keeps no transformer waiting.
        asked = job.elsewhere is not None and (item.index == 0 or len(held) > 1)
        asked = asked and not any(isinstance(one.latents, VideoResult) for one in held)  # these have no latents to give
        if asked and job.elsewhere is not None and job.elsewhere():
            if len(held) == job.request.num_videos_per_prompt:
                self._succeed(job, ())
            return
        videos = self._videos[job.id]
        for one in held:
            if isinstance(one.latents, VideoResult):
                videos.append(one.latents)
                continue
            with self.trace.span("decode", job):
                videos.append(generate.decode_video(self.models, job, one.index, one.latents))
        held.clear()
        if len(videos) == job.request.num_videos_per_prompt:
            self._succeed(job, tuple(videos))

    def _succeed(self, job: Job, videos: tuple[VideoResult, ...]) -> None:
        job.timings["total_s"] = time.perf_counter() - job.created
        peaks = self.models.peaks.end(job.id, job.rank_peaks)
        self._forget(job)
        job.succeed(JobResult(videos, dict(job.timings), peaks, tuple(job.warnings)))

    def _attempt(self, job: Job, work: Callable[[], None]) -> None:
        """Do a stage's work for a job; an error ends that job and leaves the stage ready for the next."""
        if job.finished:  # another of its videos has failed
            return
        try:
            job.check_cancelled()
            work()
        except BaseException as error:
            self._forget(job)
            self.models.recover(error)
            job.fail(error)

    def _forget(self, job: Job) -> None:
        self._open.discard(job)
        self.models.peaks.forget(job.id)
        self._videos.pop(job.id, None)
        self._held.pop(job.id, None)
