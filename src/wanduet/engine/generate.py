"""The stages of one video, with its files: encode the prompt, denoise, decode and write.

Each function takes the models, a job or one of its videos, and the result of the stage before; the pipeline calls them.
Results are saved until the video is written: checkpoints during the denoise, latents before the decode.
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

from wanduet.engine.group import EngineModels
from wanduet.engine.job import Job, Video, VideoResult
from wanduet.engine.record import made_alike, provenance_of, video_digest
from wanduet.engine.strategies import checkpoints_of, strategy_of
from wanduet.errors import (
    OutputError,
)
from wanduet.family.spec import ModelSpec
from wanduet.media.files import UnreadableFileError
from wanduet.media.latents import load_latents, save_latents
from wanduet.media.read import read_metadata
from wanduet.media.video import VideoSpec, WrittenVideo, write_video
from wanduet.request import ResolvedRequest
from wanduet.runtime.context import Event
from wanduet.stages.task import Conditions, DenoiseTask

log = logging.getLogger(__name__)

# A video at quality 75 takes about a tenth of a bit per pixel and frame; this is well above.
BYTES_PER_PIXEL_FRAME = 0.25


def encode(models: EngineModels, job: Job) -> Conditions:
    """Encode what a job's videos are conditioned on: its prompts, and the video that it starts from, if any.

    Raises the errors of `Strategy.encode_video`.
    """
    conditions = _encode_prompts(models, job)
    request = job.request
    if not request.uses_input:
        return conditions
    if not request.num_denoising_steps:
        share = f"{request.num_inference_steps} step{'s' * (request.num_inference_steps > 1)}"
        job.warnings.append(
            f"strength {request.strength:g} of {share} leaves no step to make: the video is the input video, encoded and "
            "decoded. A higher strength or more steps change it."
        )
    return replace(conditions, video=strategy_of(models, job.videos[0]).encode_video(job.videos[0]))


def _encode_prompts(models: EngineModels, job: Job) -> Conditions:
    """Encode prompts to embeddings on the CPU, or read them from the cache. Warn about truncated prompts."""
    request = job.request
    texts = [request.prompt, *([request.negative_prompt] if request.uses_guidance else [])]
    with job.context.timed("encode_s"):
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
    return Conditions(encoded[0], encoded[1] if request.uses_guidance else None)


def finished_video(models: EngineModels, video: Video) -> VideoResult | None:
    """Return the video that an earlier run finished with the same settings; None if there is none, or without
    `resume`."""
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
def denoise_video(models: EngineModels, video: Video, conditions: Conditions) -> Tensor:
    """Denoise a video, save its latents, and return them: `[16, T, h, w]` float32 on the host.

    With `resume`, return the saved latents of an earlier run if they match. Raises OutputError if they cannot be saved,
    and the errors of `Strategy.denoise`.
    """
    if video.job.output.resume and (latents := _kept_latents(models, video)) is not None:
        return latents
    task = _task(models, video, conditions)
    checkpoints = checkpoints_of(models, task)
    if task.resume:
        checkpoints.adopt()
    latents = strategy_of(models, video).denoise(video, task)
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


def _task(models: EngineModels, video: Video, conditions: Conditions) -> DenoiseTask:
    job = video.job
    return DenoiseTask(
        job.request,
        video.index,
        conditions,
        video_digest(models, video),
        about={"request": job.request.recorded(), "seed": video.seed, "model": models.about},
        writer=job.id,
        resume=job.output.resume,
        checkpoint_seconds=models.config.checkpoint_seconds,
        watched=job.watch is not None,
    )


def decode_video(models: EngineModels, video: Video, latents: Tensor) -> VideoResult:
    """Decode latents `[16, T, h, w]` and write the video file. On out-of-memory, decode in smaller parts.

    Remove the saved latents, unless the job keeps them (`save_latents`). Raises the errors of `Strategy.decode`,
    OutputError.
    """
    written, provenance = strategy_of(models, video).decode(video, latents, partial(_write, models, video))
    kept = video.latents_path if video.job.output.save_latents else None
    if kept is None:
        with suppress(OSError):
            video.latents_path.unlink(missing_ok=True)
    return VideoResult(written.path, video.seed, written.num_frames, kept, provenance)


Written = tuple[WrittenVideo, dict[str, Any]]


def _write(models: EngineModels, video: Video, frames: Iterator[NDArray[np.uint8]]) -> Written:
    request, output, provenance = video.request, video.job.output, provenance_of(models, video)
    with video.context.timed("write_s"):
        written = write_video(
            _timed_decode(video, frames),
            video.path,
            VideoSpec(request.height, request.width, request.fps, output.codec, output.quality),
            provenance,
        )
    return written, provenance


def bytes_on_disk(request: ResolvedRequest, spec: ModelSpec) -> int:
    """Return an upper estimate of the bytes on disk of a request's videos and latents."""
    pixels = request.height * request.width * request.num_frames
    latents = 4 * prod(spec.latent_shape(request.generated_height, request.generated_width, request.num_frames))
    return request.num_videos_per_prompt * int(pixels * BYTES_PER_PIXEL_FRAME + latents)


def kept_latents(models: EngineModels, job: Job) -> tuple[Tensor, ...] | None:
    """Return the saved latents of all videos of a job, `[16, T, h, w]` each, so that only the decode remains; None if
    any are missing or do not match, or without `resume`."""
    if not job.output.resume or not all(video.latents_path.exists() for video in job.videos):
        return None
    found = []
    for video in job.videos:
        latents = _kept_latents(models, video)
        if latents is None:
            return None
        found.append(latents)
    return tuple(found)


def _kept_latents(models: EngineModels, video: Video) -> Tensor | None:
    """Return the latents that an earlier run saved beside the output, if they belong to this video; else None."""
    path = video.latents_path
    if not path.exists():
        return None
    try:
        latents, about = load_latents(path)
    except UnreadableFileError as error:
        log.warning("%s Denoising again.", error)
        return None
    if about.get("digest") != video_digest(models, video):
        return None
    video.reuse_latents(about)
    return latents


def _timed_decode(video: Video, frames: Iterator[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    """Yield the frames, and count the time spent decoding them in decode_s instead of write_s. Raises
    CancelledError."""
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
