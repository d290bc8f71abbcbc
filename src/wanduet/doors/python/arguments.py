"""Checks of a call's arguments before anything is loaded. Nothing is silently ignored."""

import logging
from collections.abc import Sequence
from typing import Any, SupportsFloat

import torch
from torch import Tensor

CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")
log = logging.getLogger(__name__)


def check_call(
    guidance_scale_2: float | None,
    attention_kwargs: dict[str, Any] | None,
    output_type: str | None,
    tensors: Sequence[str],
) -> None:
    """Raise ValueError for arguments that this engine does not support."""
    if guidance_scale_2 is not None:
        raise ValueError("guidance_scale_2 is for Wan2.2's two transformers; this is Wan2.1.")
    if attention_kwargs:
        raise ValueError(f"attention_kwargs={attention_kwargs} are not supported (LoRA scales, for example).")
    if output_type not in (None, "np", "pil", "pt", "latent"):
        raise ValueError(f"output_type={output_type!r} is not supported: np, pil, pt or latent.")
    unknown = [name for name in tensors if name not in CALLBACK_TENSORS]
    if unknown:
        raise ValueError(f"callback_on_step_end_tensor_inputs: {unknown} are not among {CALLBACK_TENSORS}.")


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
