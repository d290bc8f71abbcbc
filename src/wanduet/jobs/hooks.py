"""What the runner asks of the engine's side beside running jobs. Everything here is imported when it is called:
a process that only looks after jobs does without torch.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from wanduet.jobs.records import ModelId
from wanduet.request import GenerationRequest

if TYPE_CHECKING:
    from wanduet.engine.job import Event, JobResult, OutputOptions


class RunningJob(Protocol):
    """What the runner needs of `wanduet.engine.job.Job`."""

    def events(self) -> "Iterator[Event]":
        """Progress as it happens; ends when the job does."""

    def result(self, timeout: float | None = None) -> "JobResult":
        """The videos; raises what the job failed with."""

    def cancel(self) -> None:
        """Stop within a step; `result` then raises CancelledError."""


class Watcher(Protocol):
    """Sees the steps of a denoise, to show the video taking shape."""

    def __call__(self, info: Any) -> None:
        """After each step, in the denoising thread; must not raise."""


class VideoEngine(Protocol):
    """What the runner needs of `wanduet.engine.pipeline.Engine`."""

    def submit(
        self,
        request: GenerationRequest,
        output: "OutputOptions",
        *,
        watch: Watcher | None = None,
        elsewhere: Callable[[], bool] | None = None,
    ) -> RunningJob:
        """Start a job; its videos go where `output` says. With `resume`, go on from what is there.

        `elsewhere` is asked when latents are kept: if it says yes, they are left to another worker's decode and
        the result has no videos.
        """


def engine_output(path: Path, resume: bool) -> "OutputOptions":
    """The engine's own output options. Latents stay until the job's work is discarded: until its videos are published
    whoever comes next need only decode.
    """
    from wanduet.engine.job import OutputOptions

    return OutputOptions(path, save_latents=True, resume=resume, taken=True)


def video_previews(path: Path) -> dict[str, bytes]:
    """The thumbnail (WebP) and sprite sheet (JPEG) of a finished video."""
    from wanduet.media.preview import spritesheet, thumbnail

    return {"thumbnail": thumbnail(path), "spritesheet": spritesheet(path)}


def step_previews(engine: Any, path: Path, request: GenerationRequest) -> Watcher:
    """Pictures of the video taking shape, at a path."""
    from wanduet.jobs.previews import watch_job

    return watch_job(engine.models, engine.config.data_folder, path, request)


def checkpoint_keys(engine: Any, running: Any) -> list[str]:
    """The names under which the engine keeps a job's checkpoints."""
    from wanduet.engine.record import video_digest

    return [video_digest(engine.models, video) for video in running.videos]


def engine_model(engine: Any) -> ModelId | None:
    """The model that the engine has, by its public name and its weights; reads a few MiB of them."""
    return identify(engine.models)


def identify(models: Any) -> ModelId:
    """The same for the engine's models alone (`engine.build.Models`)."""
    return ModelId(models.spec.name, models.about["hash"])


def predicted_seconds(running: Any) -> dict[str, float]:
    """What the engine's plan says of a job: seconds of one denoising step (`denoise`) and of all decoding (`decode`)."""
    seconds, request = running.plan.prediction.seconds, running.request
    steps = max(1, request.num_inference_steps * request.num_videos_per_prompt)
    return {"denoise": seconds.denoise / steps, "decode": seconds.decode}


def device_memory(engine: Any) -> dict[str, dict[str, int]]:
    """Bytes by kind and device: what this process has allocated and reserved, what all together use. None on CPUs."""
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
    """The functions above, or others for another engine."""

    make_output: Callable[[Path, bool], "OutputOptions"] = engine_output
    make_previews: Callable[[Path], Mapping[str, bytes]] = video_previews
    watch_steps: Callable[[Any, Path, GenerationRequest], Watcher | None] = step_previews
    checkpoint_keys: Callable[[Any, Any], list[str]] = checkpoint_keys
    model_of: Callable[[Any], ModelId | None] = engine_model  # None: it takes any job
    predict_seconds: Callable[[Any], Mapping[str, float]] = predicted_seconds
    measure_memory: Callable[[Any], Mapping[str, Mapping[str, int]]] = device_memory
