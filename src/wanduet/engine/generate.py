"""One video, stage by stage: encode the prompt, denoise, decode and write.

Each function takes the models, a job, and what the stage before made; the pipeline calls them. Whatever
was computed is kept until it is on disk: checkpoints during the denoise, latents before the decode.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wanduet.engine.build import Models
from wanduet.engine.denoising import Conditioning, DenoiseTask, Denoising, Surroundings
from wanduet.engine.job import Event, Job, VideoResult
from wanduet.engine.ladder import DenoiseLadder, decode_modes, reserve_decode
from wanduet.errors import CancelledError, ConfigError, OutOfMemoryError, OutputError
from wanduet.media.files import UnreadableFileError
from wanduet.media.latents import load_latents, save_latents
from wanduet.media.provenance import make_provenance, versions
from wanduet.media.read import read_metadata
from wanduet.media.video import WrittenVideo, write_video
from wanduet.models.vae_stream import decode_stream
from wanduet.parallel.launch import RankFailedError
from wanduet.request import ResolvedRequest
from wanduet.sampling.checkpoint import Checkpoints
from wanduet.specs import ModelSpec

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


def finished_video(models: Models, job: Job, index: int) -> VideoResult | None:
    """Video `index` of the job as an earlier run has finished it, where the job goes on from that run."""
    path, kept = job.video_path(index), job.latents_path(index)
    if not job.output.resume or not path.exists() or (job.output.save_latents and not kept.exists()):
        return None
    seed, wanted = job.request.seed + index, _provenance(models, job, index)
    try:
        about = read_metadata(path)
    except UnreadableFileError:
        return None
    if any(about.get(name) != wanted[name] for name in ("request", "seed", "model", "output")):
        return None
    return VideoResult(path, seed, job.request.num_frames, kept if job.output.save_latents else None, about)


@torch.no_grad()
def denoise_video(models: Models, job: Job, index: int, conditioning: Conditioning) -> Tensor:
    """Noise to latents `[16, T, h, w]` float32 on the host, for video `index` of the job; kept on disk already."""
    digest = job_digest(models, job.request, index)
    if job.output.resume and (latents := _kept_latents(job, index, digest)) is not None:
        return latents
    about = {"request": job.request.model_dump(), "seed": job.request.seed + index, "model": models.about}
    seconds = models.config.checkpoint_seconds
    watched = job.watch is not None
    task = DenoiseTask(job.request, index, conditioning, digest, about, job.output.resume, seconds, watched)
    latents = (
        _denoise_on_ranks(models, job, task) if job.plan.strategy == "parallel" else _denoise_here(models, job, task)
    )
    save_latents(job.latents_path(index), latents, _provenance(models, job, index) | {"digest": digest})
    _checkpoints(models, task).remove()
    return latents


def _denoise_here(models: Models, job: Job, task: DenoiseTask) -> Tensor:
    with models.transformer(job) as denoiser, job.timed("denoise_s"):
        with models.if_idle(job.plan.vae_device) as idle:
            if idle:  # else a decode runs there, and shows that its memory is there
                reserve_decode(job, models.memory)
        ladder = DenoiseLadder(job, denoiser)
        around = Surroundings(job.emit, lambda: job.cancelled, job.on_step, job.watch, ladder, job.rungs.append)
        latents = Denoising(task, models.spec, denoiser, _checkpoints(models, task), around)()
        job.attention = denoiser.attention
    return latents


def _denoise_on_ranks(models: Models, job: Job, task: DenoiseTask) -> Tensor:
    """By the group; one that falls is started again and goes on from the last checkpoint."""
    if job.on_step is not None:
        raise ConfigError("A step callback cannot be used with --strategy parallel.", hint="Use single or placed.")
    for attempt in range(GROUP_ATTEMPTS):
        try:
            with models.group(job) as group, job.timed("denoise_s"):
                return group.denoise(job, task)
        except RankFailedError as error:
            models.close_group()
            problem = error
        if job.fallback is not None and not _checkpoints(models, task).load():
            break  # it never got going; no use to wait for its timeout again
        task = replace(task, resume=True)
        if attempt < GROUP_ATTEMPTS - 1:
            log.warning("%s Starting the group again.", problem.message)
            job.rungs.append(f"denoise: group started again ({problem.message})")
    if job.fallback is None:
        raise problem
    task = replace(task, resume=True)
    log.warning("%s Going on without a group.", problem.message)
    job.rungs.append(f"denoise: without a group ({problem.message})")
    job.plan = job.fallback
    return _denoise_here(models, job, task)


def _checkpoints(models: Models, task: DenoiseTask) -> Checkpoints:
    return Checkpoints(models.config.data_folder / "checkpoints", task.digest)


def decode_video(models: Models, job: Job, index: int, latents: Tensor) -> VideoResult:
    """Latents to a finished video file. Running out of memory makes it smaller and slower, not lost."""
    shared = _decode_on_ranks(models, job, index, latents) if job.plan.strategy == "parallel" else None
    written, provenance = shared or _decode_here(models, job, index, latents)
    kept = job.latents_path(index)
    if not job.output.save_latents:
        with suppress(OSError):
            kept.unlink(missing_ok=True)
    seed = job.request.seed + index
    return VideoResult(written.path, seed, written.num_frames, kept if job.output.save_latents else None, provenance)


Written = tuple[WrittenVideo, dict[str, Any]]


def _decode_here(models: Models, job: Job, index: int, latents: Tensor) -> Written:
    """On the VAE's device, in smaller parts each time that memory runs out, at last on the CPU."""
    problem = ""

    def show(done: int, total: int) -> None:
        job.check_cancelled()  # strip by strip, frames come only at the end
        job.emit(Event("decode", done, total, index))

    for device, mode in decode_modes(job):
        if problem:
            log.warning("Out of memory while decoding; going on with %d strips, %s-major.", mode.num_strips, mode.order)
            job.rungs.append(f"decode: {mode.order}-major, {mode.num_strips} strips on {device}")
        try:
            with models.vae(job, device) as vae:
                return _write(models, job, index, decode_stream(vae, latents, mode, show))
        except torch.OutOfMemoryError as error:
            problem = str(error).split(". ")[0]
        models.make_room(device)
    raise OutOfMemoryError(
        f"Decoding ran out of memory in its smallest form ({problem}).",
        hint=f"The latents are kept: wanduet decode {job.latents_path(index)}",
    )


def _decode_on_ranks(models: Models, job: Job, index: int, latents: Tensor) -> Written | None:
    """Each rank a strip of rows; None if the group failed, for then one device must do it."""
    try:
        with models.group(job) as group:
            return _write(models, job, index, group.decode(job, latents, index))
    except (CancelledError, OutputError):
        models.close_group()  # its ranks still decode
        raise
    except RankFailedError as error:
        models.close_group()
        log.warning("%s Decoding on one device.", error.message)
        job.rungs.append(f"decode: on one device ({error.message})")
        return None


def _write(models: Models, job: Job, index: int, frames: Iterator[NDArray[np.uint8]]) -> Written:
    request, provenance = job.request, _provenance(models, job, index)
    with job.timed("write_s"):
        written = write_video(
            _timed_decode(job, frames),
            job.video_path(index),
            fps=request.fps,
            codec=job.output.codec,
            quality=job.output.quality,
            size=(request.height, request.width),
            metadata=provenance,
        )
    return written, provenance


def bytes_on_disk(request: ResolvedRequest, spec: ModelSpec) -> int:
    """Room that a video and its latents need, on the safe side."""
    pixels = request.height * request.width * request.num_frames
    latents = 4 * prod(spec.latent_shape(request.generated_height, request.generated_width, request.num_frames))
    return request.num_videos_per_prompt * int(pixels * BYTES_PER_PIXEL_FRAME + latents)


def job_digest(models: Models, request: ResolvedRequest, index: int) -> str:
    """What a checkpoint belongs to: everything that has a say in the latents."""
    settings = {k: v for k, v in request.model_dump().items() if k not in ("fps", "num_videos_per_prompt")}
    about = {"request": settings, "index": index, "model": models.about, "text_len": models.spec.text_len}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def kept_latents(models: Models, job: Job) -> tuple[Tensor, ...] | None:
    """The latents of all of a job's videos where an earlier run left them, so that only the decode is left to do."""
    if not job.output.resume:
        return None
    found = []
    for index in range(job.request.num_videos_per_prompt):
        latents = _kept_latents(job, index, job_digest(models, job.request, index))
        if latents is None:
            return None
        found.append(latents)
    return tuple(found)


def _kept_latents(job: Job, index: int, digest: str) -> Tensor | None:
    """What an earlier run left beside the output, if it belongs to this video."""
    path = job.latents_path(index)
    if not path.exists():
        return None
    try:
        latents, about = load_latents(path)
    except UnreadableFileError as error:
        log.warning("%s Denoising again.", error)
        return None
    if about.get("digest") != digest:
        return None
    job.found_latents(about)
    return latents


def _timed_decode(job: Job, frames: Iterator[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    """Frames as they come, until the job is cancelled. Moves the time spent decoding from write_s to decode_s."""
    while True:
        job.check_cancelled()
        began = time.perf_counter()
        chunk = next(frames, None)
        seconds = time.perf_counter() - began
        job.add_time("decode_s", seconds)
        job.add_time("write_s", -seconds)
        if chunk is None:
            return
        yield chunk


def _provenance(models: Models, job: Job, index: int) -> dict[str, Any]:
    plan = job.plan
    engine = {
        "strategy": plan.strategy,
        "transformer_dtype": plan.transformer_dtype,
        "vae_dtype": plan.vae_dtype,
        "tf32": plan.tf32,
        "choices": [{"setting": c.setting, "value": c.value} for c in plan.choices],
    }
    if job.denoised is not None:  # perhaps by another machine
        made = job.denoised.get("engine", {})
        engine |= {name: made[name] for name in ("strategy", "transformer_dtype") if name in made}
        engine["denoised_on"] = job.denoised.get("hardware", [])
    output = {"output": {"codec": job.output.codec, "quality": job.output.quality}}
    return output | make_provenance(
        job.request,
        seed=job.request.seed + index,
        model=models.about,
        engine=engine,
        versions=versions(),
        created_at=datetime.now(UTC),
        hardware=[d.name for d in plan.devices],
        attention=job.attention,
        timings={k: round(v, 3) for k, v in job.timings.items() if v},
        rungs=job.rungs,
        warnings=job.warnings,
    )
