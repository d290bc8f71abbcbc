"""One video of a measurement: made by an engine, decoded to memory, with its seconds. No file is left but the latents."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel

from wanduet.accelerate.skipped_steps import forwards_made
from wanduet.engine.job import Job, OutputOptions, Video
from wanduet.engine.pipeline import Engine
from wanduet.engine.record import video_digest
from wanduet.engine.strategies import strategy_of
from wanduet.errors import CancelledError
from wanduet.family.spec import ModelSpec
from wanduet.media.files import UnreadableFileError, atomic_output
from wanduet.media.latents import load_latents
from wanduet.planning.plan import Plan
from wanduet.price.compare import Made
from wanduet.price.replay import Followed
from wanduet.request import GenerationRequest, ResolvedRequest
from wanduet.sampling.checkpoint import Checkpoints
from wanduet.sampling.denoise import StepInfo, Watch
from wanduet.sampling.predictor import OnPredict

Progress = Callable[[float], None]  # the share of the denoise that is done
POLL_SECONDS = 0.05
MOST_SCORES = 2**30  # bytes of the attention scores of one forward, up to which PyTorch's plain attention is used


@contextmanager
def other_kernels(plan: Plan, request: ResolvedRequest, spec: ModelSpec) -> Iterator[bool]:
    """Make PyTorch compute attention by products and softmax in the block, on a CPU. Yield whether it does: the scores
    must have room in memory."""
    tokens = spec.num_tokens(request.generated_height, request.generated_width, request.num_frames)
    scores = 4 * spec.transformer.num_attention_heads * tokens**2
    applies = plan.transformer.device == "cpu" and scores <= MOST_SCORES
    with sdpa_kernel(SDPBackend.MATH) if applies else nullcontext():
        yield applies


def make(
    engine: Engine, request: GenerationRequest, path: Path, progress: Progress, on_predict: OnPredict | None = None
) -> Made:
    """Make a video; its latents are kept at `path`. Raises the job's errors, and CancelledError on Ctrl-C."""
    job = engine.submit(request, _output(path), decode=False, on_predict=on_predict)
    return _made(engine, job, path, progress)


def follow(
    engine: Engine, request: GenerationRequest, path: Path, progress: Progress, followed: Followed
) -> None:  # fmt: skip
    """Make the latents of a video along another run's trajectory, and leave none. Raises as `make` does."""
    job = engine.submit(
        request, _output(path), followed.next_latents, decode=False, on_predict=followed
    )  # fmt: skip
    try:
        with _cleared(engine, job):
            _wait(job, progress)
    finally:
        latents_path(path).unlink(missing_ok=True)


def make_with_other_kernels(engine: Engine, request: GenerationRequest, path: Path, progress: Progress) -> Made | None:
    """Make a video with other exact kernels, from its second step on; None if there are none: the floor of all losses is
    what rounding alone does. Raises as `make` does."""
    plan, changed = engine.plan(request), [False]

    def use_plain(info: StepInfo) -> None:
        loaded = engine.models.transformer.loaded
        if not info.step and loaded is not None:
            changed[0] = loaded.use_plain_kernels()

    watch: Watch = use_plain
    resolved = request.resolve(engine.models.spec)
    with other_kernels(plan, resolved, engine.models.spec) as applies:
        if plan.strategy == "parallel" or (plan.transformer.device == "cpu" and not applies):
            return None
        job = engine.submit(request, _output(path), watch=watch, decode=False)
        made = _made(engine, job, path, progress)
    return made if applies or changed[0] else None


def latents_path(path: Path) -> Path:
    """Return where the latents of a video at `path` are kept."""
    return _output(path).latents_path(0, 1)


def kept(engine: Engine, request: GenerationRequest, path: Path) -> Made:
    """Return a video from latents that an earlier run kept; its seconds are those of the decode. Raises
    UnreadableFileError, also for latents of another request (its seed or negative prompt), and errors of the decode."""
    job = Job(request.resolve(engine.models.spec), engine.plan(request), _output(path))
    latents, about = load_latents(latents_path(path))
    if about.get("request") != job.request.recorded():
        raise UnreadableFileError(f"{latents_path(path)} are the latents of another request.")
    return _decoded(engine, job, latents)


def _decoded(engine: Engine, job: Job, latents: torch.Tensor) -> Made:
    video, request = job.videos[0], job.request
    began = time.perf_counter()
    with torch.no_grad():
        frames = strategy_of(engine.models, video).decode(video, latents, partial(_collect, request))
    seconds = time.perf_counter() - began + job.timings["denoise_s"]
    return Made(latents, frames, seconds, forwards_made(request, video.record.skipped_steps))


def _output(path: Path) -> OutputOptions:
    return OutputOptions(path.with_suffix(".mp4"), save_latents=True)


def _made(engine: Engine, job: Job, path: Path, progress: Progress) -> Made:
    with _cleared(engine, job):
        _wait(job, progress)
        return _decoded(engine, job, load_latents(latents_path(path))[0])


def _wait(job: Job, progress: Progress) -> None:
    for event in job.events():
        if event.phase == "denoise":
            progress(event.done / max(1, event.total))
    job.result()


@contextmanager
def _cleared(engine: Engine, job: Job) -> Iterator[None]:
    """On Ctrl-C, cancel the job, remove its checkpoints, and raise CancelledError."""
    try:
        yield
    except (KeyboardInterrupt, CancelledError):
        job.cancel()
        while not job.finished:
            time.sleep(POLL_SECONDS)
        _remove_checkpoints(engine, job.videos[0])
        raise CancelledError("Interrupted.", hint="What was measured is kept: the same command goes on.") from None


def _remove_checkpoints(engine: Engine, video: Video) -> None:
    with suppress(OSError):
        folder = engine.models.config.data_folder / "checkpoints"
        Checkpoints(folder, video_digest(engine.models, video), atomic_output, video.id).remove()


def _collect(request: ResolvedRequest, chunks: Iterator[NDArray[np.uint8]]) -> torch.Tensor:
    """Copy decoded frames to one tensor `[F, H, W, 3]` of the request's size."""
    frames = [torch.from_numpy(np.array(chunk[:, : request.height, : request.width])) for chunk in chunks]
    return torch.cat(frames)
