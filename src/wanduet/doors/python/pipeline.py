"""`from wanduet import WanPipeline`: diffusers' pipeline call, run by this engine.

Where diffusers and the official code differ, this follows diffusers: the default negative prompt is "", the schedule is
the pipeline's scheduler object, a frame count is rounded with a warning. Anything unsupported raises an error.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from torch import Tensor

from wanduet.config import EngineConfig, TextEncoderHold
from wanduet.doors.python.arguments import (
    CALLBACK_TENSORS,
    check_call,
    check_kinds,
    initial_latents,
    rounded_frames,
    whole_number,
)
from wanduet.doors.python.calls import CallState, EngineManaged, refuse
from wanduet.doors.python.decode import as_output, decode_videos
from wanduet.doors.python.loading import MODULES, device_name, load_scheduler, opener, read_options
from wanduet.doors.python.loop import Callback, CallbackSettings, PipelineLoop, Progress
from wanduet.doors.python.modules import check_scheduler
from wanduet.doors.python.parts import PipelineParts, owner_of
from wanduet.doors.python.shown import SHOWN, ReplaceablePart
from wanduet.doors.python.text import encode, negatives_of, prompts_of, repeated
from wanduet.planning.plan import Plan
from wanduet.runtime.context import NO_JOB
from wanduet.runtime.leases import VAE

__all__ = ["WanPipeline", "WanPipelineOutput"]


class WanPipeline(CallState, EngineManaged):
    """Text to video with diffusers' `WanPipeline` call. Construct it with `from_pretrained`.

    Calls of one pipeline, and of those that `from_pipe` made of it, run one at a time, also from several threads. A
    callback may read the pipeline's attributes, encode text, decode latents and replace the scheduler; calling the
    pipeline or replacing other components raises PipelineBusyError. Strategy `parallel` is never planned here, because
    the callback and the scheduler are objects of this process: two GPUs are used as `placed`.
    """

    _callback_tensor_inputs = CALLBACK_TENSORS
    _optional_components = ("transformer_2",)
    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        scheduler: Any,
        transformer: Any,
        transformer_2: None = None,
        boundary_ratio: None = None,
        expand_timesteps: bool = False,
    ) -> None:
        """Construct it from modules of diffusers' and transformers', or from another pipeline's `components`.

        It runs on all GPUs until `to` is called. Raises TypeError or ValueError for a module that cannot be used.
        """
        if transformer_2 is not None or boundary_ratio is not None or expand_timesteps:
            refuse(type(self), "boundary_ratio")
        given = dict(zip(MODULES, (tokenizer, text_encoder, vae, transformer), strict=True))
        shown = {id(owner): owner for m in given.values() if (owner := owner_of(m)) is not None}
        if len(shown) == 1:
            (source,) = shown.values()
            self._setup(source.with_modules(_others(given, source)), scheduler)
            return
        if lacking := [name for name, module in given.items() if module is None]:
            raise ValueError(f"WanPipeline needs {lacking[0]}=; from_pretrained loads what is not given.")
        self._setup(PipelineParts(EngineConfig("given modules"), lambda: None, given), scheduler)

    def _setup(self, parts: PipelineParts, scheduler: Any) -> None:
        self._parts = parts
        self._shown = {kind: shown(parts) for kind, shown in SHOWN.items()}
        self.scheduler = load_scheduler(parts) if scheduler is None else scheduler
        self._progress_bar_config: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: torch.dtype | str | Mapping[str, Any] | None = None,
        torch_dtype: torch.dtype | str | Mapping[str, Any] | None = None,
        revision: str | None = None,
        vae_dtype: torch.dtype | None = None,
        devices: str | None = None,
        text_encoder_hold: TextEncoderHold = "auto",
        vram_limit: int | None = None,
        data_dir: Path | None = None,
        **keywords: Any,
    ) -> Self:
        """Construct a pipeline from a folder, hub id or `miniature`; weights are loaded when they are needed.

        `dtype` (or `torch_dtype`) is the transformer's dtype (None: float32), or a dict by component; the VAE is
        float32 unless the dict or `vae_dtype` names it. `vae`, `transformer`, `text_encoder`, `tokenizer` and
        `scheduler` replace the model's own components and keep their dtypes. Further `keywords` are diffusers': see
        `wanduet.doors.python.loading`.

        Not in diffusers: `vae_dtype`, and `devices`, `vram_limit` (bytes), `text_encoder_hold` as on the command line.

        Raises ModelNotFoundError, ValueError for a keyword that is refused, TypeError for one that diffusers does not
        have either.
        """
        if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
            raise ValueError("Give dtype or torch_dtype, not both.")
        options = read_options(keywords, torch_dtype if dtype is None else dtype, vae_dtype)
        settings = options.engine | ({} if devices is None else {"devices": devices})
        config = EngineConfig(
            model=str(pretrained_model_name_or_path), revision=revision, text_encoder_hold=text_encoder_hold,
            vram_limit=vram_limit, data_dir=data_dir, **settings,
        )  # fmt: skip
        pipe = cls.__new__(cls)
        parts = PipelineParts(config, opener(config, options), options.modules)
        parts.base  # noqa: B018 - a model that is not there is refused here
        pipe._setup(parts, options.scheduler)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: Any, **keywords: Any) -> Self:
        """Construct a second pipeline from another one: a WanPipeline, sharing its models, or diffusers' own.

        `keywords` replace components; `torch_dtype` (or `dtype`) converts, as `to` does.
        """
        dtype = keywords.pop("torch_dtype", None) or keywords.pop("dtype", None)
        if unknown := sorted(set(keywords) - {*MODULES, "scheduler"}):
            raise TypeError(
                f"from_pipe has no keyword {unknown[0]!r}; it takes {', '.join(MODULES)}, scheduler and dtype."
            )
        if isinstance(pipeline, WanPipeline):
            given = {name: keywords.get(name) for name in MODULES}
            pipe = cls.__new__(cls)
            parts = pipeline._parts.with_modules(_others(given, pipeline._parts))
            pipe._setup(parts, keywords.get("scheduler", pipeline.scheduler))
        else:
            names = (*MODULES, "scheduler", "transformer_2")
            pipe = cls(**({n: m for n, m in pipeline.components.items() if n in names} | keywords))
        return pipe if dtype is None else pipe.to(dtype=dtype)

    def to(self, *args: Any, device: Any = None, dtype: Any = None, silence_dtype_warnings: bool = False) -> Self:
        """From the next call on, run on a device (`"cuda"`, `0`, or several: `"cuda:0,cuda:1"`), or in another dtype.

        Modules that replace components stay on their device, except a VAE; the model's own VAE keeps its dtype. Raises
        ConfigError for a device that this machine does not have, ValueError for a dtype.
        """
        if len(args) == 1 and isinstance(args[0], torch.dtype):
            dtypes, devices = [*args, dtype], [device]
        else:
            dtypes, devices = [*args[1:], dtype], [*args[:1], device]
        dtypes, devices = ([value for value in found if value is not None] for found in (dtypes, devices))
        if len(dtypes) > 1 or len(devices) > 1 or any(isinstance(value, torch.dtype) for value in devices):
            raise ValueError("to(...) takes a device and a dtype, in this order, each once.")
        device, dtype = next(iter(devices), None), next(iter(dtypes), None)
        if device is not None:
            self._parts.move(device_name(device))
        if dtype is not None:
            self._parts.convert(dtype)
        return self

    def cuda(self, device: int | None = None) -> Self:
        """See `to`."""
        return self.to("cuda" if device is None else device)

    def cpu(self) -> Self:
        """See `to`."""
        return self.to("cpu")

    # Components.

    transformer = ReplaceablePart("transformer")
    vae = ReplaceablePart("vae")
    text_encoder = ReplaceablePart("text_encoder")  # a replacing module runs unchanged, on its own device

    @property
    def tokenizer(self) -> Any:
        """The replacing tokenizer, or the model's as transformers loads it. Assignable."""
        return self._parts.tokenizer()

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        if tokenizer is not self._parts.tokenizer():
            self._parts.give("tokenizer", tokenizer)

    @property
    def scheduler(self) -> Any:
        """The scheduler object that is stepped, as in diffusers: changes of it apply from the next call on."""
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        check_scheduler(scheduler)
        self._scheduler = scheduler

    @property
    def transformer_2(self) -> None:
        """None: a second transformer is Wan2.2's."""
        return None

    @transformer_2.setter
    def transformer_2(self, module: Any) -> None:
        if module is not None:
            raise ValueError("pipe.transformer_2 is Wan2.2's; this runs Wan2.1: set pipe.transformer.")

    @property
    def components(self) -> dict[str, Any]:
        """Arguments for `WanPipeline(**components)`, which then shares this pipeline's components."""
        names = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler", "transformer_2")
        return {name: getattr(self, name) for name in names}

    @property
    def config(self) -> Any:
        """The pipeline's own config, as in diffusers."""
        from diffusers.configuration_utils import FrozenDict

        model = self._parts.config.model
        return FrozenDict({"_name_or_path": model, "boundary_ratio": None, "expand_timesteps": False})

    @property
    def name_or_path(self) -> str:
        """The model's folder, hub id or name that the pipeline was constructed from."""
        return self._parts.config.model

    @property
    def device(self) -> torch.device:
        """Device of the transformer."""
        return self._parts.devices[0]

    _execution_device = device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the transformer computes in."""
        return self._parts.dtype("transformer")

    @property
    def hf_device_map(self) -> None:
        """None: the engine places models itself."""
        return None

    @property
    def vae_scale_factor_spatial(self) -> int:
        """Pixels for one latent row or column."""
        return self._parts.spec.vae.spatial_stride

    @property
    def vae_scale_factor_temporal(self) -> int:
        """Frames for one latent frame."""
        return self._parts.spec.vae.temporal_stride

    @property
    def video_processor(self) -> Any:
        """diffusers' VideoProcessor, for the output of `vae.decode`."""
        from diffusers.video_processor import VideoProcessor

        return VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    def plan(self, height: int = 480, width: int = 832, num_frames: int = 81, guidance_scale: float = 5.0) -> Plan:
        """Return the placement of a call and its memory. Not in diffusers. Raises ValueError, DoesNotFitError."""
        with self._parts.for_use():
            return self._parts.plan_video(height, width, num_frames, guidance_scale > 1.0)[1]

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        max_sequence_length: int = 226,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Encode prompts as diffusers does. Raises ValueError.

        Returns embeddings `[B, max_sequence_length, text_dim]` of the prompt and of the negative prompt (None without
        guidance), with each prompt's videos adjacent; embeddings that are passed in are returned unchanged.
        """
        prompts = prompts_of(prompt, prompt_embeds)
        given = prompt_embeds if prompt_embeds is not None else torch.empty(0)
        count = len(given) if prompts is None else len(prompts)
        negatives = (
            negatives_of(negative_prompt, negative_prompt_embeds, count) if do_classifier_free_guidance else None
        )
        device, dtype = device or self.device, dtype or self._parts.dtype("text_encoder")
        multiple = self._parts.spec.size_multiple
        with self._parts.for_use():
            encoder = self._parts.text(self._parts.plan_video(multiple, multiple, 1, guided=False)[1])

            def embeds(texts: list[str]) -> Tensor:
                return encode(encoder, texts, max_sequence_length, num_videos_per_prompt).to(device, dtype)

            positive = embeds(prompts) if prompts is not None else given
            return positive, embeds(negatives) if negatives is not None else negative_prompt_embeds

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
        progress: Progress | None = None,
    ) -> WanPipelineOutput | tuple[Any]:
        """Generate videos as diffusers 0.42's call does; `progress(done, total)` is an addition.

        Raises ValueError for arguments that are not supported.
        """
        # diffusers' callback objects name the tensors that they need.
        seen = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs) or ()
        check_call(guidance_scale_2, attention_kwargs, output_type, seen)
        check_kinds(
            guidance_scale, generator, latents=latents, prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )  # fmt: skip
        max_sequence_length = whole_number("max_sequence_length", max_sequence_length, 1)
        num_inference_steps = whole_number("num_inference_steps", num_inference_steps, 1)
        copies = 1 if num_videos_per_prompt is None else whole_number("num_videos_per_prompt", num_videos_per_prompt, 1)
        prompts = prompts_of(prompt, prompt_embeds)
        count = len(prompts) if prompts is not None else len(prompt_embeds)  # type: ignore[arg-type]
        negatives = negatives_of(negative_prompt, negative_prompt_embeds, count)
        texts = ((prompts, prompt_embeds), (negatives if guidance_scale > 1.0 else None, negative_prompt_embeds))
        with self._parts.at_work():
            self._parts.refresh()
            spec = self._parts.spec
            if latents is not None:  # their shape sets the size, as in diffusers
                height, width = (side * spec.vae.spatial_stride for side in latents.shape[-2:])
                num_frames = (latents.shape[-3] - 1) * spec.vae.temporal_stride + 1
            height, width = whole_number("height", height), whole_number("width", width)
            num_frames = rounded_frames(whole_number("num_frames", num_frames), spec.vae.temporal_stride)
            request, plan = self._parts.plan_video(height, width, num_frames, guidance_scale > 1.0)
            self._guidance_scale, self._interrupt, self._attention_kwargs = guidance_scale, False, attention_kwargs

            dim = spec.transformer.text_dim
            positive, negative = (
                encode(self._parts.text(plan), which, max_sequence_length, copies) if which is not None
                else None if given is None
                else repeated(given, count, dim, copies)
                for which, given in texts
            )  # fmt: skip
            assert positive is not None
            shape = (count * copies, *spec.latent_shape(height, width, num_frames))
            # As in diffusers: without a generator, noise is drawn on the device that denoises.
            noise = initial_latents(shape, generator, latents, torch.device(plan.transformer.device))
            models = self._parts.models
            # Take the VAE's lock first, in lock order: a callback may decode.
            with models.locks.take(VAE), models.transformer.use(plan, request, NO_JOB) as denoiser:
                after = CallbackSettings(callback_on_step_end, seen, progress)
                loop = PipelineLoop(self, denoiser, (positive, negative), after)
                result = loop(noise.to(denoiser.device), num_inference_steps)
            decode = output_type != "latent"
            frames: Any = as_output(decode_videos(self._parts, result, plan), output_type or "np") if decode else result
        return WanPipelineOutput(frames) if return_dict else (frames,)

    def __getattr__(self, name: str) -> Any:
        """Called only for names that do not exist: raise AttributeError that says what to use instead."""
        refuse(type(self), name)


def _others(given: Mapping[str, Any], source: PipelineParts) -> dict[str, Any]:
    """Return the modules in `given` that `source` does not use already."""
    own = source.given | {"tokenizer": source.tokenizer()}
    foreign = {name: m for name, m in given.items() if m is not None and owner_of(m) is not source}
    return {name: module for name, module in foreign.items() if module is not own.get(name)}
