"""What the runner needs from the engine besides running jobs.

Functions import the engine when they are called, so that a process that only manages jobs does not load torch.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from wanduet.jobs.records import ModelId
from wanduet.request import GenerationRequest

if TYPE_CHECKING:
    from wanduet.engine.job import JobResult, OutputOptions
    from wanduet.runtime.context import Event


class RunningJob(Protocol):
    """The part of `wanduet.engine.job.Job` that the runner uses."""

    def events(self) -> "Iterator[Event]":
        """Yields progress events until the job ends."""

    def result(self, timeout: float | None = None) -> "JobResult":
        """Wait for the videos; raises the error that the job failed with."""

    def cancel(self) -> None:
        """Stop at the next step; `result` then raises CancelledError."""


class Watcher(Protocol):
    """Is called after each denoising step, to write previews."""

    def __call__(self, info: Any) -> None:
        """Called in the denoising thread with a `StepInfo`; must not raise."""


class VideoEngine(Protocol):
    """The part of `wanduet.engine.pipeline.Engine` that the runner uses."""

    def submit(
        self,
        request: GenerationRequest,
        output: "OutputOptions",
        *,
        watch: Watcher | None = None,
    ) -> RunningJob:
        """Start a job that writes its videos to `output`; if `output.resume` is True, continue from what exists there."""


def engine_output(path: Path, resume: bool) -> "OutputOptions":
    """Return the engine's output options for a job.

    Latents are saved, so that an attempt after the denoise only decodes; they are deleted with the work folder.
    """
    from wanduet.engine.job import OutputOptions

    return OutputOptions(path, save_latents=True, resume=resume, taken=True)


def video_previews(path: Path) -> dict[str, bytes]:
    """Return the thumbnail (WebP) and sprite sheet (JPEG) of a finished video."""
    from wanduet.media.preview import spritesheet, thumbnail

    return {"thumbnail": thumbnail(path), "spritesheet": spritesheet(path)}


def step_previews(engine: Any, path: Path, request: GenerationRequest) -> Watcher:
    """Return a callback that writes previews of the denoise to `path`."""
    from wanduet.previews.watch import watch_job

    return watch_job(engine.models, engine.config.data_folder, path, request)


def checkpoint_keys(engine: Any, running: Any) -> list[str]:
    """Return the keys under which the engine saves a job's checkpoints."""
    from wanduet.engine.record import video_digest

    return [video_digest(engine.models, video) for video in running.videos]


def engine_model(engine: Any) -> ModelId | None:
    """Return the engine's model: its public name and a hash of its weights, a few MiB of which are read."""
    return identify(engine.models)


def identify(models: Any) -> ModelId:
    """Return the public name and the hash of loaded models (`runtime.models.Models`)."""
    return ModelId(models.spec.name, models.about["hash"])


def predicted_seconds(running: Any) -> dict[str, float]:
    """Return the plan's prediction in seconds: of one denoising step in which nothing is skipped (`denoise`), and of the whole
    decode (`decode`)."""
    seconds, request = running.plan.prediction.seconds, running.request
    steps = max(1, request.num_denoising_steps * request.num_videos_per_prompt)
    return {"denoise": max(seconds.step, seconds.denoise / steps), "decode": seconds.decode}


def device_memory(engine: Any) -> dict[str, dict[str, int]]:
    """GPU memory in bytes by device: `allocated` and `reserved` by this process, `used` by all. Empty without GPUs."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {}
    found = {}
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found[f"cuda:{index}"] = {
            "allocated": torch.cuda.memory_allocated(index),
            "reserved": torch.cuda.memory_reserved(index),
            "used": total - free,
        }
    return found


@dataclass(frozen=True, slots=True)
class EngineHooks:
    """The functions above as fields, to replace them for another engine."""

    make_output: Callable[[Path, bool], "OutputOptions"] = engine_output
    make_previews: Callable[[Path], Mapping[str, bytes]] = video_previews
    watch_steps: Callable[[Any, Path, GenerationRequest], Watcher | None] = step_previews
    checkpoint_keys: Callable[[Any, Any], list[str]] = checkpoint_keys
    model_of: Callable[[Any], ModelId | None] = engine_model  # None: it runs jobs for any model
    predict_seconds: Callable[[Any], Mapping[str, float]] = predicted_seconds
    measure_memory: Callable[[Any], Mapping[str, Mapping[str, int]]] = device_memory
