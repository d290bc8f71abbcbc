"""`from wanduet import WanPipeline`: diffusers' pipeline call, run by this engine.

Where diffusers and the official code differ, this follows diffusers: the negative prompt is "" by default,
the schedule is the checkpoint's scheduler, a frame count is rounded with a warning. What is not supported raises.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from wanduet.config import EngineConfig, TextEncoderHold
from wanduet.engine.build import Denoiser, Models
from wanduet.engine.hardware import detect
from wanduet.engine.job import Job, OutputOptions
from wanduet.engine.ladder import DenoiseLadder, decode_modes
from wanduet.engine.plan import make_plan, require_fit
from wanduet.errors import CancelledError, InvalidRequestError, ModelNotFoundError, OutOfMemoryError
from wanduet.models.text_encoder import pad_embeddings
from wanduet.models.transformer import TextContext
from wanduet.models.vae_stream import decode_stream
from wanduet.request import GenerationRequest
from wanduet.sampling.denoise import StepInfo, denoise
from wanduet.sampling.guidance import combine
from wanduet.sampling.samplers import SchedulerSampler
from wanduet.weights.folder import read_json

# Stands for prompts and embeddings that are not known when memory is planned: of the greatest length.
ANY_PROMPT = 512 * "-"
log = logging.getLogger(__name__)

CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")
Text = TextContext | Tensor
Callback = Callable[["WanPipeline", int, Tensor, dict[str, Any]], dict[str, Any]]
SCHEDULERS = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler")
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass
class WanPipelineOutput:
    """`frames`: `[B, F, H, W, 3]` float32 in 0..1 (np), `[B, F, 3, H, W]` (pt), lists of images (pil), or latents."""

    frames: Any


class WanPipeline:
    """Text to video with diffusers' `WanPipeline` call. Make one with `from_pretrained`."""

    def __init__(self, config: EngineConfig) -> None:
        """Engine settings as of `wanduet.EngineConfig`; the model is found, and nothing is loaded yet."""
        self._config = config
        self._models = Models(config)
        self.scheduler = _load_scheduler(self._models)
        self._interrupt = False
        self._guidance_scale = 5.0
        self._num_timesteps = 0
        self._current_timestep: Tensor | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        revision: str | None = None,
        vae_dtype: torch.dtype = torch.float32,
        devices: str | None = None,
        text_encoder_hold: TextEncoderHold = "auto",
        vram_limit: int | None = None,
        data_dir: Path | None = None,
    ) -> Self:
        """A pipeline of a folder, hub id or `miniature`. `torch_dtype` is the transformer's (None: float32).

        Ours: `vae_dtype`, and `devices`, `vram_limit` (bytes), `text_encoder_hold` as on the command line.
        """
        for name, dtype in (("torch_dtype", torch_dtype or torch.float32), ("vae_dtype", vae_dtype)):
            if dtype not in DTYPE_NAMES:
                raise ValueError(f"{name}={dtype} is not supported; one of {', '.join(DTYPE_NAMES.values())}.")
        return cls(
            EngineConfig(
                model=str(pretrained_model_name_or_path),
                revision=revision,
                devices=devices,
                transformer_dtype=DTYPE_NAMES[torch_dtype or torch.float32],  # type: ignore[arg-type]
                vae_dtype=DTYPE_NAMES[vae_dtype],  # type: ignore[arg-type]
                text_encoder_hold=text_encoder_hold,
                vram_limit=vram_limit,
                data_dir=data_dir,
            )
        )

    def to(self, device: str | torch.device) -> Self:
        """Run on a device from the next call on."""
        self._models.unload()
        self._config = replace(self._config, devices=str(device))
        scheduler = self.scheduler
        self._models = Models(self._config)
        self.scheduler = scheduler
        return self

    @property
    def guidance_scale(self) -> float:
        """Of the call that runs, or ran last."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the negative prompt takes part."""
        return self._guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        """Steps of the call that runs, or ran last."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """The timestep that is being computed."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt = True` in a callback to stop after that step."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        guidance_scale_2: float | None = None,
        num_videos_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str | None = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> WanPipelineOutput | tuple[Any]:
        """As diffusers 0.42's; `progress(done, total)` is ours. Raises ValueError for what it cannot do."""
        # diffusers' own callback objects say themselves what they want to see.
        seen = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        _refuse(guidance_scale_2, attention_kwargs, output_type, seen)
        _refuse_below_one(num_videos_per_prompt=num_videos_per_prompt, max_sequence_length=max_sequence_length)
        prompts = _prompts(prompt, prompt_embeds)
        _check_negative(negative_prompt, negative_prompt_embeds)
        num_frames = _rounded_frames(num_frames, self._models.spec.vae.temporal_stride)
        copies = num_videos_per_prompt or 1
        count = len(prompts) if prompts is not None else len(_given(prompt_embeds))
        batch = count * copies
        self._guidance_scale, self._interrupt = guidance_scale, False
        self._num_timesteps = num_inference_steps
        job = self._job(height, width, num_frames, num_inference_steps, guidance_scale)

        positive = self._embeds(job, prompts, prompt_embeds, max_sequence_length, count, copies)
        negative = None
        if self.do_classifier_free_guidance:
            texts = negative_prompt or ""
            negatives = [texts] * count if isinstance(texts, str) else texts
            if len(negatives) != count and negative_prompt_embeds is None:
                raise ValueError(f"negative_prompt has {len(negatives)} texts, prompt has {count}.")
            given = None if negative_prompt_embeds is not None else negatives
            negative = self._embeds(job, given, negative_prompt_embeds, max_sequence_length, count, copies)

        # As diffusers: where no generator says otherwise, noise is drawn on the device that denoises.
        shape = (batch, *self._models.spec.latent_shape(height, width, num_frames))
        noise = self._noise(shape, generator, latents, torch.device(job.plan.transformer_device))
        with self._models.transformer(job) as denoiser:
            loop = _Loop(self, job, denoiser, positive, negative, callback_on_step_end, seen)
            result = loop(noise.to(denoiser.device), progress)
        frames = result if output_type == "latent" else self._decode(job, result, output_type or "np")
        return WanPipelineOutput(frames) if return_dict else (frames,)

    def _job(self, height: int, width: int, num_frames: int, steps: int, scale: float) -> Job:
        """Plan the call; refused here if it does not fit."""
        try:
            request = GenerationRequest.parse(
                prompt=ANY_PROMPT, negative_prompt=ANY_PROMPT, height=height, width=width, num_frames=num_frames, num_inference_steps=steps,
                guidance_scale=scale, seed=0,
            )  # fmt: skip
            resolved = request.resolve(self._models.spec)
        except InvalidRequestError as error:
            raise ValueError(str(error)) from None
        if (resolved.generated_height, resolved.generated_width) != (height, width):
            raise ValueError(f"height={height} and width={width} must be multiples of 16.")
        plan = make_plan(resolved, self._models.memory, self._config, detect())
        require_fit(plan, resolved)
        return Job(resolved, plan, OutputOptions(Path()))

    def _embeds(
        self, job: Job, texts: list[str] | None, given: Tensor | None, max_tokens: int, count: int, copies: int
    ) -> Tensor:
        """`[batch, max_tokens, text_dim]`, each prompt repeated for its videos."""
        if given is not None:
            dim = self._models.spec.transformer.text_dim
            if given.ndim != 3 or given.shape[0] != count or given.shape[2] != dim:
                raise ValueError(f"Embeddings must be [{count}, tokens, {dim}], not {list(given.shape)}.")
            return given.repeat_interleave(copies, dim=0)
        assert texts is not None
        encoded = self._models.text(job.plan).encode(texts, max_tokens=max_tokens)
        padded = torch.cat([pad_embeddings(one.embeds, max_tokens) for one in encoded])
        return padded.repeat_interleave(copies, dim=0)

    def _noise(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
        given: Tensor | None,
        device: torch.device,
    ) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        if given is not None:
            if tuple(given.shape) != shape:
                raise ValueError(f"latents have shape {tuple(given.shape)}, this call needs {shape}.")
            return given.float()
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators were given for {shape[0]} videos.")
        noise: Tensor = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return noise

    def _decode(self, job: Job, latents: Tensor, output_type: str) -> Any:
        videos = [self._frames(job, one) for one in latents.float().cpu()]
        if output_type == "pil":
            from PIL import Image

            return [[Image.fromarray(frame) for frame in video] for video in videos]
        values = np.stack(videos).astype(np.float32) / 255.0
        return values if output_type == "np" else torch.from_numpy(values).permute(0, 1, 4, 2, 3)

    def _frames(self, job: Job, latents: Tensor) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """`[F, H, W, 3]` of one video, going down the ladder if memory runs out."""
        for device, mode in decode_modes(job):
            try:
                with self._models.vae(job, device) as vae:
                    return np.concatenate([chunk.copy() for chunk in decode_stream(vae, latents, mode)])
            except torch.OutOfMemoryError:
                log.warning("Out of memory while decoding; going on in smaller parts.")
            self._models.make_room(device)
        raise OutOfMemoryError("Decoding ran out of memory in its smallest form.")


class _Loop:
    """One call's denoise, with what a callback may change between steps."""

    def __init__(
        self, pipe: WanPipeline, job: Job, denoiser: Denoiser, positive: Tensor, negative: Tensor | None,
        callback: Callback | None, tensors: Sequence[str],
    ) -> None:  # fmt: skip
        self.pipe, self.job, self.denoiser = pipe, job, denoiser
        self.embeds = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
        self.callback, self.tensors = callback, tensors
        self.ladder = DenoiseLadder(job, denoiser)
        self.contexts = {name: self._context(value) for name, value in self.embeds.items()}
        self.timesteps = torch.empty(0)
        self.scale = pipe.guidance_scale  # of the call; a callback can turn guidance off, not change it

    def __call__(self, latents: Tensor, progress: Callable[[int, int], None] | None) -> Tensor:
        pipe, steps = self.pipe, self.job.request.num_inference_steps
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        scheduler.set_timesteps(steps, device="cpu")
        self.timesteps = scheduler.timesteps
        sampler = SchedulerSampler(scheduler, self.denoiser.device)
        rope = self.denoiser.transformer.prepare_rope(latents.shape, self.denoiser.device)
        last = [latents]

        def predict(x: Tensor, timestep: float, text: Text) -> Tensor:
            # One video at a time: that is what the plan has counted, and long sequences gain nothing together.
            times = torch.full((1,), timestep, device=x.device)
            parts = []
            for index, one in enumerate(x.split(1)):
                own = text if isinstance(text, TextContext) else text[index : index + 1]
                parts.append(self.ladder(partial(self.denoiser.transformer, one, times, own, rope)))
            return torch.cat(parts)

        def velocity(x: Tensor, timestep: float) -> Tensor:
            pipe._current_timestep = torch.tensor(timestep)
            text, negative = self.contexts["prompt_embeds"], self.contexts["negative_prompt_embeds"]
            assert text is not None
            positive = predict(x, timestep, text)
            if negative is None or not pipe.do_classifier_free_guidance:
                return positive
            return combine(positive, predict(x, timestep, negative), self.scale)

        def on_step(info: StepInfo) -> Tensor | None:
            changed = self._call_back(info)
            last[0] = info.latents if changed is None else changed
            if progress is not None:
                progress(info.step + 1, info.num_steps)
            return changed

        try:
            return denoise(velocity, latents, sampler, on_step=on_step, should_cancel=lambda: pipe.interrupt)
        except CancelledError:
            return last[0]
        finally:
            pipe._current_timestep = None

    def _call_back(self, info: StepInfo) -> Tensor | None:
        if self.callback is None:
            return None
        available = self.embeds | {"latents": info.latents}
        timestep = self.timesteps[info.step]  # in the scheduler's own dtype, as diffusers gives it
        outputs = self.callback(self.pipe, info.step, timestep, {name: available[name] for name in self.tensors}) or {}
        for name in self.embeds:
            if name in outputs and outputs[name] is not self.embeds[name]:
                self.embeds[name] = outputs[name]
                self.contexts[name] = self._context(outputs[name])
        latents: Tensor | None = outputs.get("latents")
        return None if latents is info.latents else latents

    def _context(self, embeds: Tensor | None) -> Text | None:
        """One prompt's keys and values; of several only the embeddings: their keys and values need far more."""
        if embeds is None:
            return None
        there = embeds.to(self.denoiser.device)
        if len(there) > 1:
            return there
        return self.ladder(lambda: self.denoiser.transformer.prepare_text(there))


def _load_scheduler(models: Models) -> Any:
    """The checkpoint's own; for random weights the official one. Raises ModelNotFoundError for one of another kind."""
    import diffusers

    folder = None if models.folder is None else models.folder.path / "scheduler"
    if folder is None or not folder.is_dir():
        return diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    name = read_json(folder / "scheduler_config.json").get("_class_name", SCHEDULERS[0])
    if name not in SCHEDULERS:
        known = ", ".join(SCHEDULERS)
        raise ModelNotFoundError(f"{folder}: {name} is not supported.", hint=f"Supported: {known}.")
    return getattr(diffusers, name).from_pretrained(str(folder), local_files_only=True)


def _refuse(
    guidance_scale_2: float | None,
    attention_kwargs: dict[str, Any] | None,
    output_type: str | None,
    tensors: Sequence[str],
) -> None:
    """Nothing is silently ignored."""
    if guidance_scale_2 is not None:
        raise ValueError("guidance_scale_2 is for Wan2.2's two transformers; this is Wan2.1.")
    if attention_kwargs:
        raise ValueError(f"attention_kwargs={attention_kwargs} are not supported (LoRA scales, for example).")
    if output_type not in (None, "np", "pil", "pt", "latent"):
        raise ValueError(f"output_type={output_type!r} is not supported: np, pil, pt or latent.")
    unknown = [name for name in tensors if name not in CALLBACK_TENSORS]
    if unknown:
        raise ValueError(f"callback_on_step_end_tensor_inputs: {unknown} are not among {CALLBACK_TENSORS}.")


def _refuse_below_one(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}={count} must be at least 1.")


def _prompts(prompt: str | list[str] | None, embeds: Tensor | None) -> list[str] | None:
    if prompt is not None and embeds is not None:
        raise ValueError("Give either prompt or prompt_embeds, not both.")
    if prompt is None and embeds is None:
        raise ValueError("Give prompt or prompt_embeds.")
    if prompt is None:
        return None
    _check_texts("prompt", prompt)
    return [prompt] if isinstance(prompt, str) else prompt


def _check_negative(prompt: str | list[str] | None, embeds: Tensor | None) -> None:
    if prompt is not None and embeds is not None:
        raise ValueError("Give either negative_prompt or negative_prompt_embeds, not both.")
    if prompt is not None:
        _check_texts("negative_prompt", prompt)


def _check_texts(name: str, value: object) -> None:
    if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
        raise ValueError(f"{name} must be a str or a list of them, not {type(value).__name__}.")
    if value == []:
        raise ValueError(f"{name} must not be an empty list.")


def _given(embeds: Tensor | None) -> Tensor:
    assert embeds is not None
    return embeds


def _rounded_frames(num_frames: int, stride: int) -> int:
    if num_frames % stride == 1:
        return num_frames
    rounded = max(num_frames // stride * stride + 1, 1)
    log.warning("num_frames=%d is not of the form %dn+1: using %d.", num_frames, stride, rounded)
    return rounded
