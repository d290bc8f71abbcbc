"""What `WanPipeline` and `WanVideoToVideoPipeline` have in common: how they are made, their components and settings.

Where diffusers and the official code differ, they follow diffusers: the default negative prompt is "", the schedule is
the pipeline's scheduler object, a frame count is rounded with a warning. Anything unsupported raises an error.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from wanduet.config import EngineConfig, TextEncoderResidency
from wanduet.doors.python.arguments import CALLBACK_TENSORS
from wanduet.doors.python.calls import WAN22, CallState, EngineManaged, refuse
from wanduet.doors.python.loading import MODULES, device_name, load_scheduler, opener, read_options
from wanduet.doors.python.lora_calls import LoraCalls
from wanduet.doors.python.modules import check_scheduler
from wanduet.doors.python.parts import PipelineParts, owner_of
from wanduet.doors.python.shown import SHOWN, ReplaceablePart
from wanduet.doors.python.text import encode, negatives_of, prompts_of
from wanduet.planning.plan import Plan


class PipelineBase(CallState, LoraCalls, EngineManaged):
    """A pipeline without its call.

    Calls of one pipeline, and of those that `from_pipe` made of it, run one at a time, also from several threads. A
    callback may read the pipeline's attributes, encode text, decode latents and replace the scheduler; calling the
    pipeline or replacing other components raises PipelineBusyError. Strategy `parallel` is never planned here, because
    the callback and the scheduler are objects of this process: two GPUs are used as `placed`.
    """

    _callback_tensor_inputs = CALLBACK_TENSORS
    _optional_components: ClassVar[tuple[str, ...]] = ()
    _encodes_video: ClassVar[bool] = False  # whether a call encodes a video, whose memory is planned
    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def _construct(self, given: Mapping[str, Any], scheduler: Any) -> None:
        """Set it up with modules by their names in MODULES: diffusers' and transformers', or another pipeline's.

        Raises TypeError or ValueError for a module that cannot be used.
        """
        shown = {id(owner): owner for m in given.values() if (owner := owner_of(m)) is not None}
        if len(shown) == 1:
            (source,) = shown.values()
            self._setup(source.with_modules(_others(given, source)), scheduler)
            return
        if lacking := [name for name in MODULES if given[name] is None]:
            raise ValueError(f"{type(self).__name__} needs {lacking[0]}=; from_pretrained loads what is not given.")
        self._setup(PipelineParts(EngineConfig("given modules"), lambda: None, dict(given)), scheduler)

    def _setup(self, parts: PipelineParts, scheduler: Any) -> None:
        self._parts = parts
        self._shown = {kind: shown(parts) for kind, shown in SHOWN.items()}
        self.scheduler = load_scheduler(parts) if scheduler is None else scheduler
        self._progress_bar_config: dict[str, Any] = {}

    @classmethod
    def from_pretrained(  # diffusers' keywords, and the engine's
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: torch.dtype | str | Mapping[str, Any] | None = None,
        torch_dtype: torch.dtype | str | Mapping[str, Any] | None = None,
        revision: str | None = None,
        vae_dtype: torch.dtype | None = None,
        devices: str | None = None,
        text_encoder_hold: TextEncoderResidency = "auto",
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
        """Construct a second pipeline from another one: of this package, sharing its models, or diffusers' own.

        Both `WanPipeline.from_pipe` and `WanVideoToVideoPipeline.from_pipe` take either kind. `keywords` replace
        components; `torch_dtype` (or `dtype`) converts, as `to` does.
        """
        dtype = keywords.pop("torch_dtype", None) or keywords.pop("dtype", None)
        if unknown := sorted(set(keywords) - {*MODULES, "scheduler"}):
            raise TypeError(
                f"from_pipe has no keyword {unknown[0]!r}; it takes {', '.join(MODULES)}, scheduler and dtype."
            )
        if isinstance(pipeline, PipelineBase):
            given = {name: keywords.get(name) for name in MODULES}
            pipe = cls.__new__(cls)
            parts = pipeline._parts.with_modules(_others(given, pipeline._parts))
            pipe._setup(parts, keywords.get("scheduler", pipeline.scheduler))
        else:
            if pipeline.components.get("transformer_2") is not None:
                raise ValueError(f"{cls.__name__} cannot run this pipeline: {WAN22}.")
            pipe = cls(**({n: pipeline.components.get(n) for n in (*MODULES, "scheduler")} | keywords))
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
    def components(self) -> dict[str, Any]:
        """Arguments for a pipeline of the same class, which then shares this pipeline's components."""
        names = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler", *self._optional_components)
        return {name: getattr(self, name) for name in names}

    @property
    def config(self) -> Any:
        """The pipeline's own config, as in diffusers."""
        from diffusers.configuration_utils import FrozenDict

        return FrozenDict({"_name_or_path": self._parts.config.model})

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
        """diffusers' VideoProcessor, for input videos and the output of `vae.decode`."""
        from diffusers.video_processor import VideoProcessor

        return VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    def plan(self, height: int = 480, width: int = 832, num_frames: int = 81, guidance_scale: float = 5.0) -> Plan:
        """Return the placement of a call and its memory. Not in diffusers. Raises ValueError, DoesNotFitError."""
        with self._parts.for_use():
            guided = guidance_scale > 1.0
            fields = self._parts.loras.fields()
            return self._parts.plan_video((height, width, num_frames), guided, self._encodes_video, fields)[1]

    def encode_prompt(  # diffusers' parameters
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
            encoder = self._parts.text(self._parts.plan_video((multiple, multiple, 1), guided=False)[1])

            def embeds(texts: list[str]) -> Tensor:
                return encode(encoder, texts, max_sequence_length, num_videos_per_prompt).to(device, dtype)

            positive = embeds(prompts) if prompts is not None else given
            return positive, embeds(negatives) if negatives is not None else negative_prompt_embeds

    def __getattr__(self, name: str) -> Any:
        """Called only for names that do not exist: raise AttributeError that says what to use instead."""
        refuse(type(self), name)


def _others(given: Mapping[str, Any], source: PipelineParts) -> dict[str, Any]:
    """Return the modules in `given` that `source` does not use already."""
    own = source.given | {"tokenizer": source.tokenizer()}
    foreign = {name: m for name, m in given.items() if m is not None and owner_of(m) is not source}
    return {name: module for name, module in foreign.items() if module is not own.get(name)}
