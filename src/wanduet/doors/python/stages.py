"""A video's stages as separate calls, for programs that keep what is between them, such as ComfyUI's nodes."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wanduet.config import EngineConfig
from wanduet.engine.group import EngineModels
from wanduet.engine.job import Job, OutputOptions, Video
from wanduet.engine.record import video_digest
from wanduet.engine.strategies import LocalStrategy, checkpoints_of
from wanduet.errors import InvalidRequestError
from wanduet.family.sizes import check_frames
from wanduet.family.spec import ModelSpec
from wanduet.media.embeddings import PromptEmbeds
from wanduet.models.vae.encode import Frames
from wanduet.planning.hardware import Hardware, detect
from wanduet.planning.plan import Plan, require_fit
from wanduet.planning.text import plan_text
from wanduet.request import INPUT_HASH, GenerationRequest, ResolvedRequest
from wanduet.runtime.context import Event, ignore, never
from wanduet.sampling.denoise import Watch
from wanduet.stages.decode import as_array, decode
from wanduet.stages.encode_video import encode_video
from wanduet.stages.task import Conditions, DenoiseTask

_NO_TEXT = "-"  # the prompt of a request whose text is not known, or does not matter


@dataclass(frozen=True, slots=True)
class StageHooks:
    """What a stage calls while it works.

    `on_event` gets its progress. `on_preview` gets an animated WebP of the predicted video, every half second at most, if
    the packages of the extra `server` are installed. Once
    `should_cancel` returns True, the stage raises CancelledError, within one step or one chunk of frames. None of them
    should raise.
    """

    on_event: Callable[[Event], None] = ignore
    should_cancel: Callable[[], bool] = never
    on_preview: Callable[[bytes], None] | None = None


NO_HOOKS = StageHooks()


class VideoStages:
    """The stages of one model. Loads what a stage needs and keeps it until `close`. For one thread at a time.

    Latents are normalised, `[16, T, h, w]` float32 on the host; `scaled` and `normalised` convert to and from the scale of
    the VAE's own output. Strategy `parallel` is never planned, as the stages are called one by one.
    """

    def __init__(self, config: EngineConfig, hardware: Hardware | None = None) -> None:
        """Reads the model's configuration and loads nothing else. Raises ModelNotFoundError, ConfigError."""
        self.config = config
        self._hardware = hardware or detect()
        self._models = EngineModels(config)
        self.spec: ModelSpec = self._models.spec

    def plan(self, request: GenerationRequest) -> Plan:
        """Return the plan of a request, which may not fit. Raises InvalidRequestError."""
        return self._plan(self._models.resolve(request))

    @torch.no_grad()
    def encode_prompt(self, text: str, hooks: StageHooks = NO_HOOKS) -> Tensor:
        """Return a prompt's embeddings `[tokens, text_dim]` float32 on the host, without padding.

        Raises CancelledError, WeightsError.
        """
        self._models.checkpoint.verify()
        encoder = self._models.text(plan_text(self.spec, self.config, self._hardware))

        def show(done: int, total: int) -> None:
            hooks.on_event(Event("encode", done, total))

        return encoder.encode([text], hooks.should_cancel, show)[0].embeds

    @torch.no_grad()
    def denoise(
        self,
        request: GenerationRequest,
        prompt: Tensor,
        negative: Tensor | None = None,
        source: Tensor | None = None,
        hooks: StageHooks = NO_HOOKS,
    ) -> Tensor:
        """Return the latents of a request.

        `prompt`, `negative`: embeddings as `encode_prompt` returns them; without `negative`, guidance uses that of the
        request, or the model's. `source`: latents of the request's size to start from instead of noise; `strength` of the
        request says how much is made anew. A call that was cancelled goes on from its last step when it is made again.

        Raises InvalidRequestError, DoesNotFitError, CancelledError, OutOfMemoryError, NonFiniteLatentsError,
        WeightsError.
        """
        if source is not None:
            request = request.model_copy(update={"input_video": INPUT_HASH + _digest(source)})
        resolved = self._models.resolve(request)
        shape = self.spec.latent_shape(resolved.generated_height, resolved.generated_width, resolved.num_frames)
        if source is not None and tuple(source.shape) != shape:
            raise InvalidRequestError("source", list(source.shape), f"latents {list(shape)} for this size and length")
        plan = self._plan(resolved)
        require_fit(plan, resolved)
        if resolved.uses_guidance and negative is None:
            negative = self.encode_prompt(resolved.negative_prompt, hooks)
        conditions = Conditions(
            _embeds(prompt),
            _embeds(negative) if resolved.uses_guidance and negative is not None else None,
            source if resolved.uses_input else None,
        )
        video = self._video(resolved, plan, hooks)
        self._models.checkpoint.verify(video.context)
        task = self._task(video, conditions)
        checkpoints = checkpoints_of(self._models, task)
        checkpoints.adopt()
        latents = LocalStrategy(self._models).denoise(video, task)
        checkpoints.remove()
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor, hooks: StageHooks = NO_HOOKS) -> NDArray[np.uint8]:
        """Decode latents to frames `[F, H, W, 3]` uint8.

        Raises InvalidRequestError for a shape that no video has, DoesNotFitError, OutOfMemoryError, NonFiniteFramesError,
        CancelledError.
        """
        if latents.ndim != 4 or latents.shape[0] != self.spec.vae.z_dim:
            raise InvalidRequestError("latents", list(latents.shape), f"[{self.spec.vae.z_dim}, T, h, w]")
        stride = self.spec.vae.spatial_stride
        num_frames = (latents.shape[1] - 1) * self.spec.vae.temporal_stride + 1
        video = self._unprompted(latents.shape[2] * stride, latents.shape[3] * stride, num_frames, hooks)
        return decode(self._models, video.plan, latents.float().cpu(), as_array, video.record, video.context)

    @torch.no_grad()
    def encode_frames(self, frames: NDArray[np.uint8] | NDArray[np.float32], hooks: StageHooks = NO_HOOKS) -> Tensor:
        """Encode frames `[F, H, W, 3]`, uint8 or float32 in 0..1, to latents.

        Raises InvalidRequestError for a size or a number of frames that the model does not make, DoesNotFitError,
        OutOfMemoryError, NonFiniteFramesError, CancelledError.
        """
        num_frames, height, width = frames.shape[:3]
        check_frames(num_frames, self.spec)
        video = self._unprompted(height, width, num_frames, hooks, encodes=True)

        def chunks() -> Iterator[Frames]:
            for start in (0, *range(1, num_frames, self.spec.vae.temporal_stride)):
                part = frames[start : start + self.spec.vae.temporal_stride if start else 1]
                yield part * np.float32(2) - np.float32(1) if part.dtype == np.float32 else part

        return encode_video(self._models, video.plan, chunks, video.record, video.context, num_frames)

    def scaled(self, latents: Tensor) -> Tensor:
        """Return latents `[..., 16, T, h, w]` in the scale of the VAE's output: `z * std + mean`."""
        mean, std = self._scale()
        return latents * std + mean

    def normalised(self, latents: Tensor) -> Tensor:
        """Return the latents of which `scaled` made these."""
        mean, std = self._scale()
        return (latents - mean) / std

    def close(self) -> None:
        """Unload everything and free the memory."""
        self._models.unload()

    def _scale(self) -> tuple[Tensor, Tensor]:
        vae = self.spec.vae
        return torch.tensor(vae.latents_mean).view(-1, 1, 1, 1), torch.tensor(vae.latents_std).view(-1, 1, 1, 1)

    def _plan(self, request: ResolvedRequest) -> Plan:
        return self._models.plan_here(request, self.config, self._hardware)

    def _unprompted(self, height: int, width: int, num_frames: int, hooks: StageHooks, encodes: bool = False) -> Video:
        """Return a video of a size, to plan its encode or its decode. Raises InvalidRequestError, DoesNotFitError."""
        request = GenerationRequest.parse(prompt=_NO_TEXT, height=height, width=width, num_frames=num_frames, seed=0)
        if encodes:
            request = request.model_copy(update={"input_video": INPUT_HASH + "0" * 64})
        resolved = self._models.resolve(request)
        for side, given in (("height", height), ("width", width)):
            if (nearest := getattr(resolved, f"generated_{side}")) != given:
                raise InvalidRequestError(side, given, f"a multiple of {self.spec.size_multiple}", nearest)
        plan = self._plan(resolved)
        require_fit(plan, resolved)
        return self._video(resolved, plan, hooks)

    def _video(self, request: ResolvedRequest, plan: Plan, hooks: StageHooks) -> Video:
        """Return the video of a job that no engine runs: its context has the hooks."""
        job = Job(request, plan, OutputOptions(Path(_NO_TEXT)), watch=self._watch(request, hooks))
        job.context = replace(job.context, emit=hooks.on_event, should_cancel=hooks.should_cancel)
        return job.videos[0]

    def _watch(self, request: ResolvedRequest, hooks: StageHooks) -> Watch | None:
        if hooks.on_preview is None:
            return None
        try:
            from wanduet.previews.colour_maps import find_colours
            from wanduet.previews.watch import Previews
        except ModuleNotFoundError:  # the server's packages are not installed
            return None
        folder = None if self._models.folder is None else self._models.folder.path
        return Previews(hooks.on_preview, find_colours(self.spec, folder), request)

    def _task(self, video: Video, conditions: Conditions) -> DenoiseTask:
        """Return the task of a denoise; the key of its checkpoints depends on the conditions, not on their texts."""
        given = (one for one in (conditions.prompt, conditions.negative) if one is not None)
        parts = [video_digest(self._models, video), *(_digest(one.embeds) for one in given)]
        return DenoiseTask(
            video.request,
            video.index,
            conditions,
            hashlib.sha256("/".join(parts).encode()).hexdigest()[:32],
            about={"request": video.request.recorded(), "seed": video.seed, "model": self._models.about},
            writer=video.id,
            resume=True,
            checkpoint_seconds=self.config.checkpoint_seconds,
        )


def _embeds(embeds: Tensor) -> PromptEmbeds:
    return PromptEmbeds(embeds.float().cpu(), "", "", "", "float32")


def _digest(tensor: Tensor) -> str:
    plain = tensor.detach().float().cpu().contiguous()
    return hashlib.sha256(str(list(plain.shape)).encode() + plain.numpy().tobytes()).hexdigest()
