"""The engine in ComfyUI's process: one model at a time, its stages, and conversions to ComfyUI's types."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .host import InterruptProcessingException, Progress, check_interrupt, free_memory, is_interrupted

if TYPE_CHECKING:
    from wanduet.doors.python.stages import StageHooks, VideoStages


@dataclass(frozen=True)
class ModelChoice:
    """A model and how it is held in memory. `files`: a path for each component that takes the place of the model's own."""

    model: str
    files: tuple[tuple[str, str], ...]
    weights: str
    vram_limit: int | None

    def open(self) -> VideoStages:
        """Read the model's configuration. Raises ModelNotFoundError, ConfigError."""
        if importlib.util.find_spec("wanduet") is None:
            raise RuntimeError(
                "The package wanduet is not installed in the Python that runs ComfyUI; the pack's README says how. "
                "The nodes of a server work without it."
            )
        from wanduet import EngineConfig
        from wanduet.doors.python.stages import VideoStages

        named: dict[str, Any] = {"model": self.model} if self.model else {}
        named |= {component: Path(path) for component, path in self.files}
        return VideoStages(EngineConfig(weights=self.weights, vram_limit=self.vram_limit, **named))  # type: ignore[arg-type]


class _Opened:
    """The model that is open. Another takes its place, and its memory."""

    def __init__(self) -> None:
        self._choice: ModelChoice | None = None
        self._stages: VideoStages | None = None

    def get(self, choice: ModelChoice) -> VideoStages:
        if self._stages is None or choice != self._choice:
            self.close()
            self._stages, self._choice = choice.open(), choice
        return self._stages

    def close(self) -> None:
        stages, self._stages = self._stages, None
        if stages is not None:
            stages.close()


_opened = _Opened()  # ComfyUI's nodes keep no state


def stages_of(choice: ModelChoice) -> VideoStages:
    """Return the stages of a model, which are kept. Raises ModelNotFoundError, ConfigError."""
    with _plain_tensors():
        return _opened.get(choice)


def close() -> None:
    """Unload the model that is open."""
    _opened.close()


def run(
    choice: ModelChoice, phase: str, work: Callable[[VideoStages, StageHooks], Any], keep_loaded: bool = True
) -> Any:
    """Return `work(stages, hooks)`, with progress of a phase, a preview, and ComfyUI's interrupt.

    ComfyUI's own models are unloaded first. Raises InterruptProcessingException, and the errors of the stages.
    """
    stages = stages_of(choice)
    from wanduet.doors.python.stages import StageHooks
    from wanduet.errors import CancelledError

    free_memory()
    bar = Progress()
    interrupts: list[InterruptProcessingException] = []

    def guarded(show: Callable[..., None], *given: Any) -> None:
        # An interrupt must not break a stage in its middle: it ends at the next step, and saves what it has.
        try:
            show(*given)
        except InterruptProcessingException as interrupt:
            interrupts.append(interrupt)

    hooks = StageHooks(
        on_event=lambda event: guarded(bar.show, event.done, event.total) if event.phase == phase else None,
        should_cancel=lambda: bool(interrupts) or is_interrupted(),
        on_preview=lambda picture: guarded(bar.preview, picture),
    )
    try:
        with _plain_tensors():
            return work(stages, hooks)
    except CancelledError:
        if interrupts:
            raise interrupts[0] from None
        check_interrupt()
        raise
    finally:
        if not keep_loaded:
            close()


def latent_of(stages: VideoStages, latents: Tensor) -> dict[str, Tensor]:
    """Return normalised latents `[16, T, h, w]` as LATENT: `[1, 16, T, h, w]` in the scale of the VAE's output."""
    return {"samples": stages.scaled(latents)[None]}


def samples_of(stages: VideoStages, latent: dict[str, Any]) -> Tensor:
    """Return a LATENT of one video as normalised latents `[16, T, h, w]`. Raises ValueError for another shape."""
    samples = latent["samples"]
    channels = stages.spec.vae.z_dim
    if samples.ndim != 5 or samples.shape[:2] != (1, channels):
        raise ValueError(f"The latent must be one video [1, {channels}, T, h, w], not {list(samples.shape)}.")
    return stages.normalised(samples[0].detach().float().cpu().clone())


def conditioning_of(stages: VideoStages, embeds: Tensor) -> list[Any]:
    """Return embeddings `[tokens, C]` as CONDITIONING, with zeros up to the model's number of tokens."""
    padded = embeds.new_zeros(1, max(stages.spec.text_len, len(embeds)), embeds.shape[1])
    padded[0, : len(embeds)] = embeds
    return [[padded, {}]]


def embeds_of(stages: VideoStages, conditioning: list[Any]) -> Tensor:
    """Return the embeddings `[tokens, C]` of a CONDITIONING, also of ComfyUI's own text encoder, without padding.

    Raises ValueError for several, and for those of another model.
    """
    if len(conditioning) != 1 or len(conditioning[0][0]) != 1:
        raise ValueError("The sampler takes one prompt: several conditionings cannot be combined.")
    embeds: Tensor = conditioning[0][0][0].detach().float().cpu().clone()
    wanted = stages.spec.transformer.text_dim
    if embeds.ndim != 2 or embeds.shape[1] != wanted:
        raise ValueError(
            f"The conditioning has {embeds.shape[-1]} channels, the model takes {wanted}: it is another encoder's."
        )
    used = embeds.abs().amax(1).nonzero()
    return embeds[: int(used[-1]) + 1] if len(used) else embeds[:1]


def _plain_tensors() -> Any:
    """ComfyUI runs nodes in inference mode. Weights that are made in it could not be changed outside of it."""
    return torch.inference_mode(False)
