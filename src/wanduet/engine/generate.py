"""One video, stage by stage: encode the prompt, denoise, decode and write.

Each function takes the models, a job or one of its videos, and what the stage before made; the pipeline calls them.
Whatever was computed is kept until it is on disk: checkpoints during the denoise, latents before the decode.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wanduet.distributed.launch import RankFailedError
from wanduet.engine.build import Models
from wanduet.engine.denoising import Conditioning, DenoiseTask, Denoising, Surroundings
from wanduet.engine.job import Event, Job, Video, VideoResult
from wanduet.engine.ladder import DenoiseLadder, decode_modes, reserve_decode
from wanduet.engine.record import made_alike, provenance_of, video_digest
from wanduet.errors import (
    CancelledError,
    ConfigError,
    KernelFailedError,
    NonFiniteFramesError,
    OutOfMemoryError,
    OutputError,
)
from wanduet.family.specs import ModelSpec
from wanduet.media.files import UnreadableFileError, atomic_output
from wanduet.media.latents import load_latents, save_latents
from wanduet.media.read import read_metadata
from wanduet.media.video import WrittenVideo, write_video
from wanduet.models.vae.rows import Tiling
from wanduet.models.vae.stream import decode_stream
from wanduet.request import ResolvedRequest
from wanduet.sampling.checkpoint import Checkpoints

log = logging.getLogger(__name__)

# A video at quality 75 takes about a tenth of a bit for each pixel and frame; this is safely above.
BYTES_PER_PIXEL_FRAME = 0.25
GROUP_ATTEMPTS = 3  # how often a group of ranks is started for one video


def encode_prompt(models: Models, job: Job) -> Conditioning:
    """Text to embeddings, on the CPU (or from the cache)."""
    request = job.request
    texts = [request.prompt, *([request.negative_prompt] if request.uses_guidance else [])]
    with job.timed("encode_s"):
        job.emit(Event("encode", 0, 1))
        encoded = models.text(job.plan).encode(
            texts, lambda: job.cancelled, lambda done, total: job.emit(Event("encode", done, total))
        )
        job.emit(Event("encode", 1, 1))
    for name, one in zip(("prompt", "negative_prompt"), encoded, strict=False):
        if one.cut:
            job.warnings.append(f"{name} is longer than {models.spec.text_len} tokens; cut off: {one.cut!r}")
    if not encoded[0].text:
        job.warnings.append("Nothing is left of the prompt once entities and spaces are cleaned: it says nothing.")
    return Conditioning(encoded[0], encoded[1] if request.uses_guidance else None)


def finished_video(models: Models, video: Video) -> VideoResult | None:
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
def denoise_video(models: Models, video: Video, conditioning: Conditioning) -> Tensor:
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


def _task(models: Models, video: Video, conditioning: Conditioning) -> DenoiseTask:
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


def _denoise_here(models: Models, video: Video, task: DenoiseTask) -> Tensor:
    job = video.job
    with models.transformer(video) as denoiser, video.timed("denoise_s"):
        with models.locks.if_idle(video.plan.vae.device) as idle:
            if idle:  # else a decode runs there, and shows that its memory is there
                reserve_decode(video, models.memory)
        ladder = DenoiseLadder(video, denoiser)
        around = Surroundings(video, job.emit, lambda: job.cancelled, job.on_step, job.watch, ladder)
        denoising = Denoising(task, models.spec, denoiser, _checkpoints(models, task), around)
        latents = denoising()
        video.attention, video.kernels = denoiser.attention, denoiser.transformer.runtime.kernels.name
    video.add_time("denoise_s", denoising.seconds_of_others)
    return latents


def _denoise_on_ranks(models: Models, video: Video, task: DenoiseTask) -> Tensor:
    """By the group; one that falls is started again and goes on from the last checkpoint."""
    job = video.job
    if job.on_step is not None:
        raise ConfigError("A step callback cannot be used with --strategy parallel.", hint="Use single or placed.")
    for attempt in range(GROUP_ATTEMPTS):
        try:
            with models.group(video) as group, video.timed("denoise_s"):
                return group.denoise(video, task)
        except RankFailedError as error:
            problem = error
        job.check_cancelled()  # whoever cancelled does not wait for another group
        if job.fallback is not None and not _checkpoints(models, task).load(own_only=not task.resume):
            break  # it never got going; no use to wait for its timeout again
        if attempt < GROUP_ATTEMPTS - 1:
            log.warning("%s Starting the group again.", problem.message)
            video.note(f"denoise: group started again ({problem.message})")
    if job.fallback is None:
        raise problem
    log.warning("%s Going on without a group.", problem.message)
    video.note(f"denoise: without a group ({problem.message})")
    video.plan = job.fallback
    return _denoise_here(models, video, replace(task, digest=video_digest(models, video)))


def _checkpoints(models: Models, task: DenoiseTask) -> Checkpoints:
    return Checkpoints(models.config.data_folder / "checkpoints", task.digest, atomic_output, task.writer)


def decode_video(models: Models, video: Video, latents: Tensor) -> VideoResult:
    """Latents to a finished video file. Running out of memory makes it smaller and slower, not lost."""
    shared = _decode_on_ranks(models, video, latents) if video.plan.strategy == "parallel" else None
    written, provenance = shared or _decode_here(models, video, latents)
    kept = video.latents_path if video.job.output.save_latents else None
    if kept is None:
        with suppress(OSError):
            video.latents_path.unlink(missing_ok=True)
    return VideoResult(written.path, video.seed, written.num_frames, kept, provenance)


Written = tuple[WrittenVideo, dict[str, Any]]


def _decode_here(models: Models, video: Video, latents: Tensor) -> Written:
    """On the VAE's device, in smaller parts each time that memory runs out, at last on the CPU."""
    job, problem = video.job, ""

    def show(done: int, total: int) -> None:
        job.check_cancelled()  # strip by strip, frames come only at the end
        job.emit(Event("decode", done, total, video.index))

    for device, mode in decode_modes(video):
        job.check_cancelled()  # it may have waited for memory
        if problem:
            log.warning("Out of memory while decoding; going on with %d strips, %s-major.", mode.num_tiles, mode.order)
            video.note(f"decode: {mode.order}-major, {mode.num_tiles} strips on {device}")
        try:
            return _decode_as(models, video, latents, (device, mode), show)
        except NonFiniteFramesError as error:
            error.hint = f"The latents are kept: wanduet decode {video.latents_path} --vae-dtype float32"
            raise
        except torch.OutOfMemoryError as error:
            problem = str(error).split(". ")[0]
        models.make_room(device)
    raise OutOfMemoryError(
        f"Decoding ran out of memory in its smallest form ({problem}).",
        hint=f"The latents are kept: wanduet decode {video.latents_path}",
    )


def _decode_as(
    models: Models, video: Video, latents: Tensor, how: tuple[str, Tiling], show: Callable[[int, int], None]
) -> Written:
    """On a device, in a mode; a kernel that fails is replaced by its plain form, and the decode begins again."""
    device, mode = how
    while True:
        try:
            with models.vae(video, device) as vae:
                video.vae_kernels = vae.kernels.name
                return _write(models, video, decode_stream(vae, latents, mode, show))
        except KernelFailedError as error:
            failed = error
        video.check_cancelled()
        log.warning("%s Decoding with its plain form.", failed.message)
        video.note(f"decode: plain {failed.operation} ({failed.reason})")
        models.without_vae_kernel(failed.operation)


def _decode_on_ranks(models: Models, video: Video, latents: Tensor) -> Written | None:
    """Each rank a strip of rows; None if the group failed, for then one device must do it."""
    try:
        with models.group(video) as group:
            try:
                return _write(models, video, group.decode(video, latents))
            except CancelledError:
                models.close_group()  # its ranks decode on
                raise
    except RankFailedError as error:
        problem = error
    video.check_cancelled()
    log.warning("%s Decoding on one device.", problem.message)
    video.note(f"decode: on one device ({problem.message})")
    return None


def _write(models: Models, video: Video, frames: Iterator[NDArray[np.uint8]]) -> Written:
    request, output, provenance = video.request, video.job.output, provenance_of(models, video)
    with video.timed("write_s"):
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


def kept_latents(models: Models, job: Job, any_precision: bool = False) -> tuple[Tensor, ...] | None:
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


def _kept_latents(models: Models, video: Video, any_precision: bool = False) -> Tensor | None:
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
        video.check_cancelled()
        began = time.perf_counter()
        chunk = next(frames, None)
        seconds = time.perf_counter() - began
        video.add_time("decode_s", seconds)
        video.add_time("write_s", -seconds)
        if chunk is None:
            return
        yield chunk
