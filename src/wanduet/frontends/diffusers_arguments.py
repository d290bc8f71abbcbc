"""A call's arguments, checked before anything is loaded. Nothing is silently ignored."""

import logging
from collections.abc import Sequence
from typing import Any

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
    """Raise ValueError for what this engine has not."""
    if guidance_scale_2 is not None:
        raise ValueError("guidance_scale_2 is for Wan2.2's two transformers; this is Wan2.1.")
    if attention_kwargs:
        raise ValueError(f"attention_kwargs={attention_kwargs} are not supported (LoRA scales, for example).")
    if output_type not in (None, "np", "pil", "pt", "latent"):
        raise ValueError(f"output_type={output_type!r} is not supported: np, pil, pt or latent.")
    unknown = [name for name in tensors if name not in CALLBACK_TENSORS]
    if unknown:
        raise ValueError(f"callback_on_step_end_tensor_inputs: {unknown} are not among {CALLBACK_TENSORS}.")


def check_counts(**counts: int | None) -> None:
    """Raise ValueError for a count below one."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}={count} must be at least 1.")


def rounded_frames(num_frames: int, stride: int) -> int:
    """The number of frames that is made for one that was asked for."""
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
    """The given latents, or noise as diffusers draws it, float32 `[B, 16, T, h, w]`, on whichever device. Raises ValueError."""
    from diffusers.utils.torch_utils import randn_tensor

    if given is not None:
        if tuple(given.shape) != shape:
            raise ValueError(f"latents have shape {tuple(given.shape)}, this call needs {shape}.")
        return given.float()
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators were given for {shape[0]} videos.")
    first = generator[0] if isinstance(generator, list) else generator
    if first is not None and first.device.type == device.type:
        device = first.device  # `cuda` is the first GPU, but another may be the one that denoises
    noise: Tensor = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    return noise
