"""Checks of a call's arguments before anything is loaded. Nothing is silently ignored."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from inspect import signature
from math import isfinite
from typing import Any, Self, SupportsFloat

import torch
from torch import Tensor

from wanduet.doors.python.approximations import Approximations
from wanduet.doors.python.loop import Callback, CallbackSettings, Progress
from wanduet.doors.python.text import negatives_of, prompts_of
from wanduet.family.spec import ModelSpec


class DefaultScale(float):
    """A guidance scale that a call was not given: equal to diffusers' default, which a call may also name."""


GUIDANCE_SCALE = DefaultScale(5.0)
CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")
log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class CallArguments:
    """The arguments that the calls of both pipelines take, as in diffusers, and what follows from them.

    Raises ValueError for arguments that this engine does not support.
    """

    prompt: InitVar[Any]
    negative_prompt: InitVar[Any]
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    num_videos_per_prompt: InitVar[Any]
    generator: torch.Generator | list[torch.Generator] | None
    latents: Tensor | None
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    output_type: str | None
    return_dict: bool
    attention_kwargs: dict[str, Any] | None
    callback_on_step_end: InitVar[Callback | None]
    callback_on_step_end_tensor_inputs: InitVar[Sequence[str]]
    max_sequence_length: int
    progress: InitVar[Progress | None]
    approximations: Approximations

    prompts: list[str] | None = field(init=False)  # None: the call has embeddings
    negatives: list[str] | None = field(init=False)  # None: the call has embeddings, or no guidance
    count: int = field(init=False)  # of prompts
    copies: int = field(init=False)  # videos of each prompt
    lora_scale: float = field(init=False)  # what multiplies the strengths of active LoRAs
    after: CallbackSettings = field(init=False)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Take them from the parameters of a pipeline's call, by name; those that one pipeline has alone are left out."""
        own, approximations = (
            {name: given[name] for name in signature(kind).parameters if name in given}
            for kind in (cls, Approximations)
        )
        return cls(**own, approximations=Approximations(**approximations))

    def __post_init__(
        self, prompt: Any, negative_prompt: Any, num_videos_per_prompt: Any, callback: Any, tensors: Any, progress: Any
    ) -> None:
        """Check the arguments."""
        # diffusers' callback objects name the tensors that they need.
        self.after = CallbackSettings(callback, getattr(callback, "tensor_inputs", tensors) or (), progress)
        given = self.attention_kwargs or {}
        if unknown := sorted(set(given) - {"scale"}):
            raise ValueError(f"attention_kwargs takes scale, the strength of LoRAs, and not {unknown[0]!r}.")
        self.lora_scale = number("attention_kwargs: scale", given.get("scale", 1.0))
        if self.output_type not in (None, "np", "pil", "pt", "latent"):
            raise ValueError(f"output_type={self.output_type!r} is not supported: np, pil, pt or latent.")
        if unknown := [name for name in self.after.tensors if name not in CALLBACK_TENSORS]:
            raise ValueError(f"callback_on_step_end_tensor_inputs: {unknown} are not among {CALLBACK_TENSORS}.")
        embeds = {"prompt_embeds": self.prompt_embeds, "negative_prompt_embeds": self.negative_prompt_embeds}
        check_kinds(self.guidance_scale, self.generator, latents=self.latents, **embeds)
        for name in ("max_sequence_length", "num_inference_steps"):
            setattr(self, name, whole_number(name, getattr(self, name), 1))
        for name in ("height", "width"):
            setattr(self, name, whole_number(name, getattr(self, name)))
        copies = num_videos_per_prompt
        self.copies = 1 if copies is None else whole_number("num_videos_per_prompt", copies, 1)
        self.prompts = prompts_of(prompt, self.prompt_embeds)
        self.count = len(self.prompts) if self.prompts is not None else len(self.prompt_embeds)  # type: ignore[arg-type]
        negatives = negatives_of(negative_prompt, self.negative_prompt_embeds, self.count)
        self.negatives = negatives if self.is_guided else None

    def settle_guidance(self, spec: ModelSpec) -> None:
        """Turn off a guidance that the call did not ask for, if the weights are distilled to run without. Raises ValueError
        if it asked for it."""
        if not (self.is_guided and spec.defaults.of_distilled_weights and spec.defaults.guidance_scale <= 1):
            return
        if not isinstance(self.guidance_scale, DefaultScale):
            raise ValueError(
                f"guidance_scale={self.guidance_scale:g} is not supported with {spec.name}, whose weights are distilled to run "
                "without guidance: leave it out, or set it to 1.0."
            )
        self.guidance_scale, self.negatives, self.negative_prompt_embeds = 1.0, None, None

    @property
    def is_guided(self) -> bool:
        """Whether the negative prompt is used at the first step."""
        return self.guidance_scale > 1.0


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """Return a count or size as an int, also if the caller computed it as a float. Raises ValueError."""
    try:
        if value != int(value):
            raise TypeError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}={value!r} must be a whole number.") from None
    if least is not None and value < least:
        raise ValueError(f"{name}={value} must be at least {least}.")
    return int(value)


def number(name: str, value: Any) -> float:
    """Return a finite number. Raises ValueError."""
    if not isinstance(value, SupportsFloat) or isinstance(value, str | bool) or not isfinite(float(value)):
        raise ValueError(f"{name}={value!r} must be a number.")
    return float(value)


def fraction(name: str, value: Any) -> float:
    """Return a number of 0 to 1. Raises ValueError."""
    if not isinstance(value, SupportsFloat) or isinstance(value, str | bool) or not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"{name}={value!r} must be a number of 0 to 1.")
    return float(value)


def check_kinds(guidance_scale: Any, generator: Any, **tensors: Any) -> None:
    """Raise ValueError for arguments of the wrong type."""
    if not isinstance(guidance_scale, SupportsFloat) or isinstance(guidance_scale, str):
        raise ValueError(f"guidance_scale={guidance_scale!r} must be a number.")
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    for one in generators:
        if not isinstance(one, torch.Generator):
            raise ValueError(f"generator must be a torch.Generator or a list of them, not {type(one).__name__}.")
    for name, value in tensors.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, not {type(value).__name__}.")


def rounded_frames(num_frames: int, stride: int) -> int:
    """Round a frame count as diffusers does, to a multiple of `stride` plus 1; warn if it changes."""
    if num_frames % stride == 1:
        return num_frames
    rounded = max(num_frames // stride * stride + 1, 1)
    log.warning("num_frames=%d is not of the form %dn+1: using %d.", num_frames, stride, rounded)
    return rounded


def initial_latents(
    shape: tuple[int, ...],
    generator: torch.Generator | list[torch.Generator] | None,
    given: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Return the given latents, or noise as diffusers draws it: float32 `[B, 16, T, h, w]`, on any device.

    Raises ValueError.
    """
    from diffusers.utils.torch_utils import randn_tensor

    if given is not None:
        if tuple(given.shape) != shape:
            raise ValueError(f"latents have shape {tuple(given.shape)}, this call needs {shape}.")
        return given.float()
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators were given for {shape[0]} videos.")
    first = generator[0] if isinstance(generator, list) else generator
    if first is not None and first.device.type == device.type:
        device = first.device  # `cuda` is the first GPU, but another one may denoise
    noise: Tensor = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    return noise
