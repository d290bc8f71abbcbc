"""One video, stage by stage: encode the prompt, denoise, decode and write.

Each function takes the models, a job or one of its videos, and what the stage before made; the pipeline calls them.
Whatever was computed is kept until it is on disk: checkpoints during the denoise, latents before the decode.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wanduet.distributed.launch import RankFailedError
from wanduet.engine.group import EngineModels
from wanduet.engine.job import Job, Video, VideoResult
from wanduet.engine.record import made_alike, provenance_of, video_digest
from wanduet.errors import (
    CancelledError,
    ConfigError,
    NonFiniteFramesError,
    OutOfMemoryError,
    OutputError,
)
from wanduet.family.specs import ModelSpec
from wanduet.media.files import UnreadableFileError, atomic_output
from wanduet.media.latents import load_latents, save_latents
from wanduet.media.read import read_metadata
from wanduet.media.video import WrittenVideo, write_video
from wanduet.request import ResolvedRequest
from wanduet.runtime.context import Event
from wanduet.sampling.checkpoint import Checkpoints
from wanduet.stages.decode import decode
from wanduet.stages.denoise import Conditioning, DenoiseTask, Denoising, Surroundings
from wanduet.stages.fallback import DenoiseFallback, reserve_decode

log = logging.getLogger(__name__)

# A video at quality 75 takes about a tenth of a bit for each pixel and frame; this is safely above.
BYTES_PER_PIXEL_FRAME = 0.25
GROUP_ATTEMPTS = 3  # how often a group of ranks is started for one video


def encode_prompt(models: EngineModels, job: Job) -> Conditioning:
    """Text to embeddings, on the CPU (or from the cache)."""
    request = job.request
    texts = [request.prompt, *([request.negative_prompt] if request.uses_guidance else [])]
    with job.timed("encode_s"):
        job.emit(Event("encode", 0, 1))
        encoded = models.text(job.plan.text).encode(
            texts, lambda: job.cancelled, lambda done, total: job.emit(Event("encode", done, total))
        )
        job.emit(Event("encode", 1, 1))
    for name, one in zip(("prompt", "negative_prompt"), encoded, strict=False):
        if one.cut:
            job.warnings.append(f"{name} is longer than {models.spec.text_len} tokens; cut off: {one.cut!r}")
    if not encoded[0].text:
        job.warnings.append("Nothing is left of the prompt once entities and spaces are cleaned: it says nothing.")
    return Conditioning(encoded[0], encoded[1] if request.uses_guidance else None)


def finished_video(models: EngineModels, video: Video) -> VideoResult | None:
    """The video as an earlier run has finished it with the same settings, where the job goes on from that run."""
    output, kept = video.job.output, video.latents_path
    if not output.resume or not video.path.exists() or (output.save_latents and not kept.exists()):
        return None
    try:
        about = read_metadata(video.path)
    except UnreadableFileError:
        return None
    if not made_alike(about, provenance_of(models, video)):
        return None
    return VideoResult(video.path, video.seed, video.request.num_frames, kept if output.save_latents else None, about)


@torch.no_grad()
def denoise_video(models: EngineModels, video: Video, conditioning: Conditioning) -> Tensor:
    """Noise to latents `[16, T, h, w]` float32 on the host; kept on disk already."""
    if video.job.output.resume and (latents := _kept_latents(models, video)) is not None:
        return latents
    task = _task(models, video, conditioning)
    checkpoints = _checkpoints(models, task)
    if task.resume:
        checkpoints.adopt()
    on_ranks = video.plan.strategy == "parallel"
    latents = _denoise_on_ranks(models, video, task) if on_ranks else _denoise_here(models, video, task)
    about = provenance_of(models, video) | {"digest": video_digest(models, video)}
    try:
        save_latents(video.latents_path, latents, about)
    except OutputError as error:
        if (last := checkpoints.load(own_only=True)) is not None:
            kept = f"Step {last.step} is kept: the same command with --resume goes on from there."
            error.hint = f"{error.hint or ''} {kept}".strip()
        raise
    checkpoints.remove()
    return latents


def _task(models: EngineModels, video: Video, conditioning: Conditioning) -> DenoiseTask:
    job = video.job
    return DenoiseTask(
        job.request,
        video.index,
        conditioning,
        video_digest(models, video),
        about={"request": job.request.model_dump(), "seed": video.seed, "model": models.about},
        writer=job.id,
        resume=job.output.resume,
        checkpoint_seconds=models.config.checkpoint_seconds,
        watched=job.watch is not None,
    )


def _denoise_here(models: EngineModels, video: Video, task: DenoiseTask) -> Tensor:
    job = video.job
    record, context = video.record, video.context
    with models.transformer.use(video.plan, video.request, context) as denoiser, context.timed("denoise_s"):
        with models.locks.if_idle(video.plan.vae.device) as idle:
            if idle:  # else a decode runs there, and shows that its memory is there
                video.plan = reserve_decode(video.plan, video.request, models.memory, context)
        fallback = DenoiseFallback(context, denoiser)
        around = Surroundings(record, context, job.on_step, job.watch, fallback)
        denoising = Denoising(task, models.spec, denoiser, _checkpoints(models, task), around)
        latents = denoising()
        record.attention, record.kernels = denoiser.attention, denoiser.transformer.runtime.kernels.name
    context.add_time("denoise_s", denoising.seconds_of_others)
    return latents


def _denoise_on_ranks(models: EngineModels, video: Video, task: DenoiseTask) -> Tensor:
    """By the group; one that falls is started again and goes on from the last checkpoint."""
    job = video.job
    if job.on_step is not None:
        raise ConfigError("A step callback cannot be used with --strategy parallel.", hint="Use single or placed.")
    for attempt in range(GROUP_ATTEMPTS):
        try:
            with models.group(video.plan, video.request) as group, video.context.timed("denoise_s"):
                return group.denoise(video, task)
        except RankFailedError as error:
            problem = error
        job.check_cancelled()  # whoever cancelled does not wait for another group
        if job.fallback is not None and not _checkpoints(models, task).load(own_only=not task.resume):
            break  # it never got going; no use to wait for its timeout again
        if attempt < GROUP_ATTEMPTS - 1:
            log.warning("%s Starting the group again.", problem.message)
            video.record.note(f"denoise: group started again ({problem.message})")
    if job.fallback is None:
        raise problem
    log.warning("%s Going on without a group.", problem.message)
    video.record.note(f"denoise: without a group ({problem.message})")
    video.plan = job.fallback
    return _denoise_here(models, video, replace(task, digest=video_digest(models, video)))


def _checkpoints(models: EngineModels, task: DenoiseTask) -> Checkpoints:
    return Checkpoints(models.config.data_folder / "checkpoints", task.digest, atomic_output, task.writer)


def decode_video(models: EngineModels, video: Video, latents: Tensor) -> VideoResult:
    """Latents to a finished video file. Running out of memory makes it smaller and slower, not lost."""
    shared = _decode_on_ranks(models, video, latents) if video.plan.strategy == "parallel" else None
    written, provenance = shared or _decode_here(models, video, latents)
    kept = video.latents_path if video.job.output.save_latents else None
    if kept is None:
        with suppress(OSError):
            video.latents_path.unlink(missing_ok=True)
    return VideoResult(written.path, video.seed, written.num_frames, kept, provenance)


Written = tuple[WrittenVideo, dict[str, Any]]


def _decode_here(models: EngineModels, video: Video, latents: Tensor) -> Written:
    kept = f"The latents are kept: wanduet decode {video.latents_path}"
    try:
        sink = partial(_write, models, video)
        return decode(models, video.plan, latents, sink, video.record, video.context)
    except NonFiniteFramesError as error:
        error.hint = f"{kept} --vae-dtype float32"
        raise
    except OutOfMemoryError as error:
        error.hint = kept
        raise


def _decode_on_ranks(models: EngineModels, video: Video, latents: Tensor) -> Written | None:
    """Each rank a strip of rows; None if the group failed, for then one device must do it."""
    try:
        with models.group(video.plan, video.request) as group:
            try:
                return _write(models, video, group.decode(video, latents))
            except CancelledError:
                models.close_group()  # its ranks decode on
                raise
    except RankFailedError as error:
        problem = error
    video.job.check_cancelled()
    log.warning("%s Decoding on one device.", problem.message)
    video.record.note(f"decode: on one device ({problem.message})")
    return None


def _write(models: EngineModels, video: Video, frames: Iterator[NDArray[np.uint8]]) -> Written:
    request, output, provenance = video.request, video.job.output, provenance_of(models, video)
    with video.context.timed("write_s"):
        written = write_video(
            _timed_decode(video, frames),
            video.path,
            fps=request.fps,
            codec=output.codec,
            quality=output.quality,
            size=(request.height, request.width),
            metadata=provenance,
        )
    return written, provenance


def bytes_on_disk(request: ResolvedRequest, spec: ModelSpec) -> int:
    """Room that a video and its latents need, on the safe side."""
    pixels = request.height * request.width * request.num_frames
    latents = 4 * prod(spec.latent_shape(request.generated_height, request.generated_width, request.num_frames))
    return request.num_videos_per_prompt * int(pixels * BYTES_PER_PIXEL_FRAME + latents)


def kept_latents(models: EngineModels, job: Job, any_precision: bool = False) -> tuple[Tensor, ...] | None:
    """The latents of all of a job's videos where an earlier run left them, so that only the decode is left to do.

    With `any_precision` also those that another machine has made with other dtypes than this one would.
    """
    if not job.output.resume or not all(video.latents_path.exists() for video in job.videos):
        return None
    found = []
    for video in job.videos:
        latents = _kept_latents(models, video, any_precision)
        if latents is None:
            return None
        found.append(latents)
    return tuple(found)


def _kept_latents(models: EngineModels, video: Video, any_precision: bool = False) -> Tensor | None:
    """What an earlier run left beside the output, if it belongs to this video."""
    path = video.latents_path
    if not path.exists():
        return None
    try:
        latents, about = load_latents(path)
    except UnreadableFileError as error:
        log.warning("%s Denoising again.", error)
        return None
    if about.get("digest") != video_digest(models, video, about if any_precision else None):
        return None
    video.found_latents(about)
    return latents


def _timed_decode(video: Video, frames: Iterator[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    """Frames as they come, until the job is cancelled. Moves the time spent decoding from write_s to decode_s."""
    while True:
        video.job.check_cancelled()
        began = time.perf_counter()
        chunk = next(frames, None)
        seconds = time.perf_counter() - began
        video.context.add_time("decode_s", seconds)
        video.context.add_time("write_s", -seconds)
        if chunk is None:
            return
        yield chunk
