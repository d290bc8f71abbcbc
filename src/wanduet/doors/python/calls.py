"""diffusers' calls for memory, speed and progress, and errors for names of diffusers' that the pipelines lack."""

import difflib
from typing import Any, NoReturn

import torch
from torch import Tensor

from wanduet.doors.python.loading import device_name
from wanduet.doors.python.parts import PipelineParts

_NEW_WEIGHTS = (
    "wanduet writes no weights: copy the model's folder, or give diffusers' own pipeline to WanPipeline.from_pipe"
)
_PARTS = "set the part itself, say pipe.scheduler or pipe.transformer"
WAN22 = "it runs Wan2.1, which has one transformer and one guidance scale"
_NO_IMAGES = "it makes videos of texts and of videos, not of images"
# What to use instead of diffusers' names that are not supported.
INSTEAD = {
    "save_lora_weights": "wanduet trains no LoRA",
    **dict.fromkeys(("load_lora_into_transformer", "lora_state_dict"), "load_lora_weights takes files and tensors by name"),
    "lora_scale": 'give a call attention_kwargs={"scale": 0.5}, or use set_adapters',
    "save_pretrained": _NEW_WEIGHTS,
    "push_to_hub": _NEW_WEIGHTS,
    "download": "use `wanduet download --model ID`, or from_pretrained, which fetches what is missing",
    "from_single_file": "use from_pretrained with a folder or hub id in the Diffusers layout",
    "load_ip_adapter": _NO_IMAGES,
    "image_encoder": _NO_IMAGES,
    "image_processor": "frames are converted by video_processor",
    "encode_image": _NO_IMAGES,
    "boundary_ratio": WAN22,
    "transformer_2": WAN22,
    "enable_freeu": "FreeU is for UNets",
    "check_inputs": "the call itself checks its arguments",
    "get_timesteps": "the call itself applies strength=",
    "prepare_latents": "the call draws them with generator=, or takes yours with latents=",
    "_get_t5_prompt_embeds": "use encode_prompt",
    "register_modules": _PARTS,
    "register_to_config": _PARTS,
    "save_config": _NEW_WEIGHTS,
    "load_config": "use from_pretrained with a folder or hub id",
    "numpy_to_pil": 'call it with output_type="pil"',
    "unet": "the denoiser is pipe.transformer",
    "load_textual_inversion": "change pipe.tokenizer and pipe.text_encoder, which may be transformers' own",
}  # fmt: skip


def refuse(owner: type, name: str) -> NoReturn:
    """Raise AttributeError that says what to use instead of a name, or which name is similar."""
    if name in INSTEAD:
        raise AttributeError(f"{owner.__name__} has no {name}: {INSTEAD[name]}.")
    near = [] if name.startswith("__") else difflib.get_close_matches(name, dir(owner), 1)
    raise AttributeError(f"{owner.__name__} has no attribute {name!r}" + (f"; is {near[0]!r} meant?" if near else "."))


class Named(type):
    """Metaclass that refuses diffusers' class methods, too, with what to use instead."""

    def __getattr__(cls, name: str) -> Any:
        """Called only for names that do not exist."""
        refuse(cls, name)


class EngineManaged(metaclass=Named):
    """diffusers' calls to save memory or time, which change no result here.

    The engine's plan does both for every call: if memory requires it, models are on a device one at a time, weights stay
    in host memory and frames are decoded in row tiles. Only the device that a call names has an effect.
    """

    _parts: PipelineParts
    _progress_bar_config: dict[str, Any]

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: str | torch.device | None = None) -> None:
        """Run on the given GPU, if any; models are on it one at a time if they do not fit together."""
        self._use_device(gpu_id, device)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """Run on the given GPU, if any.

        Blocks are offloaded to host memory if they do not fit (see also `vram_limit`).
        """
        self._use_device(gpu_id, device)

    def enable_group_offload(self, onload_device: str | torch.device | None = None, *_: Any, **__: Any) -> None:
        """Run on `onload_device`.

        Blocks that do not fit are offloaded to host memory; their copies overlap with the computation.
        """
        self._use_device(None, onload_device)

    def _use_device(self, gpu_id: int | None, device: str | torch.device | None) -> None:
        if gpu_id is None and device is None:
            return
        named = torch.device("cuda" if device is None else device)
        if named.index is not None and gpu_id not in (None, named.index):
            raise ValueError(f"gpu_id={gpu_id} and device={device} name two devices.")
        index = named.index if gpu_id is None else gpu_id
        self._parts.move(named.type if index is None else device_name(f"{named.type}:{index}"))

    def maybe_free_model_hooks(self) -> None:
        """Do nothing: the engine has no hooks."""

    def remove_all_hooks(self) -> None:
        """Do nothing: the engine has no hooks."""

    def reset_device_map(self) -> None:
        """Leave the choice of devices to the plan again."""
        self._parts.configure(devices=None)

    def enable_vae_tiling(self, *_: Any, **__: Any) -> None:
        """Do nothing: the plan uses row tiles, which are exact, if memory requires them."""

    def disable_vae_tiling(self) -> None:
        """Do nothing: row tiles change no pixel."""

    def enable_vae_slicing(self) -> None:
        """Do nothing: videos are decoded one at a time."""

    def disable_vae_slicing(self) -> None:
        """Do nothing: videos are decoded one at a time."""

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Do nothing: attention never materialises its scores."""

    def disable_attention_slicing(self) -> None:
        """Do nothing: attention is not sliced."""

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Do nothing: attention never materialises its scores, and the fastest back end is chosen by measurement."""

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Do nothing: see `enable_xformers_memory_efficient_attention`."""

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        """Return a tqdm bar with the arguments of `set_progress_bar_config`."""
        from diffusers.utils.logging import tqdm  # diffusers' tqdm: silent if its progress bars are disabled

        if iterable is None and total is None:
            raise ValueError("Give iterable or total.")
        return tqdm(iterable, total=total, **self._progress_bar_config)

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Set the arguments of each call's tqdm bar: `disable=True`, `desc="..."`, `leave=False` and so on."""
        self._progress_bar_config = kwargs


class CallState:
    """Attributes of the current or latest call that diffusers' programs and callbacks read."""

    _interrupt = False
    _guidance_scale = 5.0
    _attention_kwargs: dict[str, Any] | None = None
    _num_timesteps = 0
    _current_timestep: Tensor | None = None

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the negative prompt is used: guidance scale above 1."""
        return self._guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        """Length of the scheduler's timesteps: more than the number of steps for a second-order scheduler."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """The current timestep, in the scheduler's dtype; None outside of the steps."""
        return self._current_timestep

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """The call's `attention_kwargs`, as given."""
        return self._attention_kwargs

    @property
    def interrupt(self) -> bool:
        """Whether to stop after the current step: a callback sets `_interrupt = True`."""
        return self._interrupt
