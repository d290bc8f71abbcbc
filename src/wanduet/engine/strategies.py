"""The execution of a plan's strategy: on this process's devices, or on a group of ranks that falls back to them."""

import logging
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import chain
from typing import Protocol, TypeVar

from torch import Tensor

from wanduet.distributed.launch import RankFailedError
from wanduet.engine.group import EngineModels
from wanduet.engine.job import Video
from wanduet.engine.record import video_digest
from wanduet.errors import (
    ConfigError,
    KernelFailedError,
    NonFiniteFramesError,
    OutOfMemoryError,
    WanduetError,
)
from wanduet.media.files import atomic_output
from wanduet.media.input_video import frames_of
from wanduet.sampling.checkpoint import Checkpoints
from wanduet.stages.decode import Sink, decode
from wanduet.stages.denoise import denoise
from wanduet.stages.encode_video import encode_video
from wanduet.stages.fallback import reserve_decode
from wanduet.stages.task import DenoiseTask, StepHooks

log = logging.getLogger(__name__)

Result = TypeVar("Result")
GROUP_ATTEMPTS = 3  # how often a group of ranks is started for one video


class Strategy(Protocol):
    """Makes one video. Deviations from the plan are recorded in the video's record and plan."""

    def encode_video(self, video: Video) -> Tensor:
        """Encode the input video of a request. Return normalised latents `[16, T, h, w]` float32 on the host.

        Raises CancelledError, InvalidRequestError (the file has changed), NonFiniteFramesError, OutOfMemoryError.
        """

    def denoise(self, video: Video, task: DenoiseTask) -> Tensor:
        """Denoise a video. Return latents `[16, T, h, w]` float32 on the host.

        Raises CancelledError, NonFiniteLatentsError, OutOfMemoryError, WeightsError, RankFailedError.
        """

    def decode(self, video: Video, latents: Tensor, sink: Sink[Result]) -> Result:
        """Decode latents `[16, T, h, w]` into a sink and return the sink's result.

        Raises CancelledError, NonFiniteFramesError, OutOfMemoryError, and the sink's errors.
        """


class LocalStrategy:
    """Strategies `single` and `placed`: makes a video on the devices of this process."""

    def __init__(self, models: EngineModels) -> None:
        self._models = models

    def encode_video(self, video: Video) -> Tensor:
        """See Strategy."""
        frames = frames_of(video.request)
        return encode_video(self._models, video.plan, frames, video.record, video.context, video.request.num_frames)

    def denoise(self, video: Video, task: DenoiseTask) -> Tensor:
        """See Strategy."""
        models, job, record, context = self._models, video.job, video.record, video.context
        with models.transformer.use(video.plan, video.request, context) as denoiser, context.timed("denoise_s"):
            with models.locks.if_idle(video.plan.vae.device) as idle:
                if idle:  # else a decode is running there, so its memory is allocated already
                    video.plan = reserve_decode(video.plan, video.request, models.memory, context)
            hooks = StepHooks(job.on_step, job.watch, job.on_predict)
            latents = denoise(task, denoiser, checkpoints_of(models, task), hooks, record, context)
            record.attention, record.kernels = denoiser.attention, denoiser.kernels
        return latents

    def decode(self, video: Video, latents: Tensor, sink: Sink[Result]) -> Result:
        """See Strategy."""
        with _latents_kept(video):
            return decode(self._models, video.plan, latents, sink, video.record, video.context)


class GroupStrategy:
    """Strategy `parallel`: makes a video on a group of ranks. If the group fails, this process continues: a decode
    always, a denoise if the job has a fallback plan (the user did not choose `parallel`)."""

    def __init__(self, models: EngineModels) -> None:
        self._models, self._local = models, LocalStrategy(models)

    def encode_video(self, video: Video) -> Tensor:
        """See Strategy. Rank 0 encodes; if the group fails, this process does."""
        try:
            with self._models.group(video.plan, video.request) as group:
                return group.encode_video(video)
        except RankFailedError as error:
            problem = error
        video.job.check_cancelled()
        log.warning("%s Encoding the input video without a group.", problem.message)
        video.record.note(f"encode_video: without a group ({problem.message})")
        return self._local.encode_video(video)

    def denoise(self, video: Video, task: DenoiseTask) -> Tensor:
        """See Strategy. A failed group is restarted, up to GROUP_ATTEMPTS starts, and resumes from the last checkpoint; if a
        kernel has failed, without that kernel.

        Raises ConfigError for a job with a step callback.
        """
        models, job = self._models, video.job
        if job.on_step is not None:
            raise ConfigError("A step callback cannot be used with --strategy parallel.", hint="Use single or placed.")
        for attempt in range(GROUP_ATTEMPTS):
            try:
                with models.group(video.plan, video.request) as group, video.context.timed("denoise_s"):
                    return group.denoise(video, task)
            except (RankFailedError, KernelFailedError) as error:
                problem: WanduetError = error
            job.check_cancelled()  # do not start another group for a cancelled job
            is_lost = isinstance(problem, RankFailedError)
            if is_lost and job.fallback is not None and not checkpoints_of(models, task).load(own_only=not task.resume):
                break  # it failed before its first checkpoint; do not wait for a second timeout
            if attempt < GROUP_ATTEMPTS - 1:
                log.warning("%s Starting the group again.", problem.message)
                video.record.note(f"denoise: group started again ({problem.message})")
        if job.fallback is None:
            raise problem
        log.warning("%s Going on without a group.", problem.message)
        video.record.note(f"denoise: without a group ({problem.message})")
        video.plan = job.fallback
        return self._local.denoise(video, replace(task, digest=video_digest(models, video)))

    def decode(self, video: Video, latents: Tensor, sink: Sink[Result]) -> Result:
        """See Strategy. Each rank decodes some rows. If the group or a kernel fails, one device decodes the whole video."""
        try:
            with (
                _latents_kept(video),
                self._models.group(video.plan, video.request) as group,
                closing(group.decode(video, latents)) as frames,
            ):
                began = time.perf_counter()
                first = next(frames)  # the ranks say with it which kernels they use, which the metadata tell
                waited = time.perf_counter() - began
                made = sink(chain([first], frames))
                video.context.add_time("decode_s", waited)
                return made
        except (RankFailedError, KernelFailedError) as error:
            problem: WanduetError = error
        video.job.check_cancelled()
        log.warning("%s Decoding on one device.", problem.message)
        video.record.note(f"decode: on one device ({problem.message})")
        return self._local.decode(video, latents, sink)


@contextmanager
def _latents_kept(video: Video) -> Iterator[None]:
    """Let the errors of a decode say how to decode again."""
    kept = f"The latents are kept: wanduet decode {video.latents_path}"
    try:
        yield
    except NonFiniteFramesError as error:
        error.hint = f"{kept} --vae-dtype float32"
        raise
    except OutOfMemoryError as error:
        error.hint = kept
        raise


def strategy_of(models: EngineModels, video: Video) -> Strategy:
    """Return the strategy of a video's plan."""
    return GroupStrategy(models) if video.plan.strategy == "parallel" else LocalStrategy(models)


def checkpoints_of(models: EngineModels, task: DenoiseTask) -> Checkpoints:
    """Return the checkpoints of a denoise task."""
    return Checkpoints(models.config.data_folder / "checkpoints", task.digest, atomic_output, task.writer)
