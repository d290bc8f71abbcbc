"""The state behind a pipeline: settings, the modules that replace components, and the engine's models."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import torch

from wanduet.config import EngineConfig
from wanduet.doors.python.loras import PipelineLoras
from wanduet.doors.python.modules import (
    CLASSES,
    check_module,
    check_text_encoder,
    folder_with,
    module_dtype,
    stamp,
    unwrapped,
)
from wanduet.doors.python.text import GivenPromptEncoder, RetokenizedEncoder
from wanduet.errors import InvalidRequestError
from wanduet.family.registry import RANDOM_SPECS
from wanduet.family.spec import ModelSpec
from wanduet.models.text.tokenizer import load_tokenizer
from wanduet.planning.hardware import Hardware, detect
from wanduet.planning.placement import find_placements
from wanduet.planning.plan import Plan, require_fit
from wanduet.planning.text import plan_text
from wanduet.request import INPUT_HASH, GenerationRequest, ResolvedRequest
from wanduet.runtime.models import Models
from wanduet.runtime.text_host import PromptEncoder
from wanduet.weights.diffusers import ModelFolder

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# A prompt of maximum length: memory is planned before the actual prompts and embeddings are known.
ANY_PROMPT = 512 * "-"
ANY_INPUT = f"{INPUT_HASH}{64 * '0'}"  # stands for an input video
NOTHING: Mapping[str, Any] = {}
OpenFolder = Callable[[], ModelFolder | None]


class PipelineBusyError(RuntimeError):
    """A callback called its own pipeline, or replaced one of its components."""


class PipelineParts:
    """State shared by a pipeline and all pipelines that `from_pipe` made of it; their calls run one at a time."""

    def __init__(self, config: EngineConfig, open_folder: OpenFolder, given: dict[str, Any]) -> None:
        """`open_folder` opens the model's folder (None for random weights); `given` modules replace its components.

        Raises ModelNotFoundError, or TypeError and ValueError for a module that cannot be used.
        """
        self.config, self._open = config, open_folder
        self.given: dict[str, Any] = {}
        self._stamps: dict[str, str] = {}
        self._own: dict[str, EngineConfig] = {}  # settings before a module of that kind replaced the component
        self._tokenizer: Any = None
        self._models: Models | None = None
        self._hardware: Hardware | None = None
        self._base: tuple[ModelFolder | None] | None = None
        self._lock, self._owner = threading.Lock(), 0
        self._text: PromptEncoder | None = None
        self.loras = PipelineLoras()  # of the transformer
        for kind, module in given.items():
            if module is not None:
                self.give(kind, module)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Raise TypeError: `copy.deepcopy`, `pickle` and inter-process transfer are not supported."""
        raise TypeError(
            "A wanduet pipeline and its parts hold loaded models, which are neither copied nor pickled: use "
            "WanPipeline.from_pipe(pipe) for a second pipeline of the same parts, or from_pretrained in another process."
        )

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Lock the pipeline for one call, after another thread's call has ended.

        Raises PipelineBusyError inside a callback.
        """
        if self._owner == threading.get_ident():
            raise PipelineBusyError(
                "This pipeline is in the middle of a call, whose callback cannot call it again or replace its parts: "
                "set `pipe._interrupt = True` and do so afterwards, or make a second pipeline with from_pretrained."
            )
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = 0

    @contextmanager
    def for_use(self) -> Iterator[None]:
        """As `at_work`, but for what a callback may also do: encode text, decode latents."""
        if self._owner == threading.get_ident():
            yield
        else:
            with self.at_work():
                yield

    # Components.

    def give(self, kind: str, module: Any) -> None:
        """Replace a component from the next call on.

        None, or the pipeline's own `ShownPart` (also compiled), restores the model's own component, which is loaded
        when it is needed. Raises TypeError or ValueError.
        """
        module = unwrapped(module)
        if module is not None and module is self.given.get(kind):
            return  # `refresh` detects changes of its weights at the next call
        owner = owner_of(module)
        if owner is not None and owner is not self:
            raise TypeError(
                f"pipe.{kind} of another wanduet pipeline holds no weights: use WanPipeline.from_pipe, or give a module of "
                "diffusers' or transformers'."
            )
        if module is None or owner is self:
            with self.at_work():
                self._take_back(kind, free=module is None and kind in CLASSES)
            return
        if kind in CLASSES:
            check_module(kind, module)
        elif kind == "text_encoder":
            check_text_encoder(module)
        elif not callable(module):
            raise TypeError(f"pipe.tokenizer takes a tokenizer of transformers', not {type(module).__name__}.")
        if self.config.model in RANDOM_SPECS:
            raise ValueError(
                f"pipe.{kind} cannot be given to {self.config.model}, whose weights are random: load a model."
            )
        with self.at_work():
            if kind not in self.given:
                self._own[kind] = self.config
            self.given = self.given | {kind: module}
            self._set_dtype(kind, module)
            self._drop_for(kind)

    def _take_back(self, kind: str, free: bool) -> None:
        """Restore the checkpoint's own component and its dtype; `free` unloads it even if it was not replaced."""
        if kind in self.given:
            self.given = {name: module for name, module in self.given.items() if name != kind}
            own, field = self._own.pop(kind), f"{kind}_dtype"
            if hasattr(own, field):  # a tokenizer has no dtype
                self.config = replace(self.config, **{field: getattr(own, field)})
            self._drop_for(kind)
        elif free:
            self.drop()

    def _drop_for(self, kind: str) -> None:
        """Unload what depends on a component."""
        if kind == "transformer":
            self.loras = PipelineLoras()
        if kind == "tokenizer":
            self._text = None
        else:
            self.drop()

    def _set_dtype(self, kind: str, module: Any) -> None:
        """Keep the dtype that a module has, as in diffusers."""
        if kind != "tokenizer" and (name := DTYPE_NAMES.get(module_dtype(module))):
            changed: dict[str, Any] = {f"{kind}_dtype": name}
            self.config = replace(self.config, **changed)

    def with_modules(self, modules: dict[str, Any]) -> "PipelineParts":
        """Return a copy that replaces components by `modules` and loads separately; self if `modules` is empty."""
        if not modules:
            return self
        parts = PipelineParts(self.config, self._open, self.given | modules)
        if "transformer" not in modules:
            parts.loras = self.loras  # as in diffusers, where they are parts of the transformer
        return parts

    def configure(self, **changes: Any) -> None:
        """Change settings from the next call on. Raises ConfigError."""
        with self.at_work():
            config = replace(self.config, **changes)
            if config != self.config:
                find_placements(config, detect())  # raise now instead of in the next call
                self.config = config
                self.drop()

    def move(self, device: str) -> None:
        """Run on a device, or on several.

        A VAE that was passed as a module moves too, for programs that call it themselves: it is small.
        """
        self.configure(devices=device)
        if "vae" in self.given:
            with self.at_work():
                self.given["vae"].to(device.split(",")[0].split("=")[-1])

    def convert(self, dtype: torch.dtype) -> None:
        """Compute in `dtype`, also in modules that replace components; the model's own VAE keeps its dtype.

        Raises ValueError.
        """
        name = dtype_name(dtype)
        for kind in ("transformer", "vae", "text_encoder"):
            if kind in self.given:
                self.given[kind].to(dtype)
        changes = {f"{kind}_dtype": name for kind in ("transformer", *(k for k in self.given if k in CLASSES))}
        self.configure(**changes)

    def drop(self) -> None:
        """Unload the models; the next call loads them again."""
        models, self._models, self._text = self._models, None, None
        self._hardware = None  # detect again, once our models no longer occupy the devices
        if models is not None:
            models.unload()

    # The engine's models.

    @property
    def base(self) -> ModelFolder | None:
        """The model's own folder; None for random weights, or if modules replace all components."""
        if self._base is None:
            self._base = (self._open(),)
        return self._base[0]

    @property
    def models(self) -> Models:
        """The engine's models, with the weights that replacing modules had at the last `refresh`."""
        if self._models is None:
            modules = self._modules
            models = Models(self.config)
            given = {kind: module for kind, module in self.given.items() if kind != "tokenizer"}
            for kind, module in modules.items():
                check_module(kind, module)
            models.checkpoint.folder = folder_with(self.base, given) if given else self.base
            self._stamps = {kind: stamp(module) for kind, module in modules.items()}
            self._models = models
        return self._models

    @property
    def _modules(self) -> dict[str, Any]:
        """The replacing modules whose weights the engine copies."""
        return {kind: module for kind, module in self.given.items() if kind in CLASSES}

    def refresh(self) -> None:
        """Unload the models if a replacing module has changed since: new weights, another dtype.

        The caller holds the lock.
        """
        changed = {kind for kind, module in self._modules.items() if self._stamps.get(kind) != stamp(module)}
        if self._models is not None and changed:
            for kind in changed:
                self._set_dtype(kind, self.given[kind])
            self.drop()

    @property
    def spec(self) -> ModelSpec:
        """The model's shapes."""
        return self.models.spec

    @property
    def hardware(self) -> Hardware:
        """The hardware before anything was loaded, so that the plan does not subtract loaded models twice."""
        if self._hardware is None:
            self._hardware = detect()
        return self._hardware

    @property
    def devices(self) -> tuple[torch.device, torch.device]:
        """Devices of the transformer and of the VAE, before a call's size is known."""
        place = self._placement()
        return torch.device(place.transformer.name), torch.device(place.vae.name)

    def _placement(self) -> Any:
        return find_placements(self.config, self.hardware)[0]

    def dtype(self, kind: str) -> torch.dtype:
        """Return the dtype that a component computes in."""
        if kind in self.given and kind != "tokenizer":
            return module_dtype(self.given[kind])
        if kind == "text_encoder":
            return getattr(torch, plan_text(self.spec, self.config).dtype)
        name = self.config.transformer_dtype if kind == "transformer" else self.config.vae_dtype
        return torch.float32 if name == "auto" else getattr(torch, name)

    def text(self, plan: Plan) -> PromptEncoder:
        """Return the prompt encoder, with the text encoder or tokenizer that replaces the model's, if any."""
        tokenizer, encoder = self.given.get("tokenizer"), self.given.get("text_encoder")
        if tokenizer is None and encoder is None and (self.base is not None or self.config.model in RANDOM_SPECS):
            return self.models.text(plan.text)
        if encoder is None and self.base is None:
            raise ValueError("This pipeline has no text encoder: set pipe.text_encoder, or give prompt_embeds=.")
        if self._text is None:
            if encoder is None:
                assert self.base is not None
                self._text = RetokenizedEncoder(self.base, plan, tokenizer)
            else:
                self._text = GivenPromptEncoder(encoder, tokenizer if tokenizer is not None else self.tokenizer())
        return self._text

    def tokenizer(self) -> Any:
        """Return the replacing tokenizer, or the checkpoint's as transformers loads it; None for random weights."""
        if "tokenizer" in self.given:
            return self.given["tokenizer"]
        if self._tokenizer is None and self.base is not None:
            self._tokenizer = load_tokenizer(self.base.tokenizer, self.base.sentencepiece)
        return self._tokenizer

    # Planning.

    def plan_video(
        self, size: tuple[int, int, int], guided: bool, encodes: bool = False, fields: Mapping[str, Any] = NOTHING
    ) -> tuple[ResolvedRequest, Plan]:
        """Plan a video of a size: height and width in pixels, and frames.

        `encodes`: also the encoding of an input video of its size. `fields`: of a request, that approximate, and its LoRAs,
        which are among `loras`.

        Raises ValueError for a size that the model does not support and for fields that it or the device refuses, DoesNotFitError.
        """
        height, width, num_frames = size
        self.models.transformer.loras.given = self.loras.by_hash()
        try:
            request = GenerationRequest.parse(
                prompt=ANY_PROMPT, negative_prompt=ANY_PROMPT, height=height, width=width, num_frames=num_frames,
                guidance_scale=5.0 if guided else 1.0, seed=0, input_video=ANY_INPUT if encodes else None,
                **fields,
            )  # fmt: skip
            resolved = request.resolve(self.models.spec, None, self.models.price)
        except InvalidRequestError as error:
            raise ValueError(str(error)) from None
        if (resolved.generated_height, resolved.generated_width) != (height, width):
            multiple = self.models.spec.size_multiple
            raise ValueError(f"height={height} and width={width} must be multiples of {multiple}.")
        try:
            # Other processes could not share this one's callback and scheduler.
            plan = self.models.plan_here(resolved, self.config, self.hardware)
        except InvalidRequestError as error:  # of a device that cannot do it
            raise ValueError(str(error)) from None
        require_fit(plan, resolved)
        return resolved, plan


def dtype_name(dtype: Any) -> str:
    """Return `float32`, `bfloat16` or `float16` for a torch.dtype or its name. Raises ValueError."""
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPE_NAMES:
        raise ValueError(f"dtype={dtype} is not supported; one of {', '.join(DTYPE_NAMES.values())}.")
    return DTYPE_NAMES[found]


def owner_of(module: Any) -> PipelineParts | None:
    """Return the pipeline state that a `ShownPart`, also compiled, belongs to; None for any other module."""
    owner = getattr(unwrapped(module), "__dict__", {}).get("parts")  # `__dict__`: wrappers may forward attribute access
    return owner if isinstance(owner, PipelineParts) else None
