"""Stand-ins for `pipe.transformer`, `pipe.vae` and `pipe.text_encoder`, which the engine loads and runs itself.

They have a config, dtype and device, accept diffusers' calls to save memory or time (the engine's plan does both), and
refuse other calls by name. They do not expose weights, whose location the plan decides.
"""

import dataclasses
import inspect
import logging
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from wanduet.doors.python.modules import CLASSES
from wanduet.doors.python.parts import PipelineParts, dtype_name
from wanduet.doors.python.videos import decode_videos
from wanduet.family.spec import NOT_IN_CONFIG

log = logging.getLogger(__name__)

# Calls that change no result, only memory and speed, which the engine plans itself.
NOTHING_TO_DO = (
    "enable_tiling", "disable_tiling", "enable_slicing", "disable_slicing", "enable_group_offload", "compile",
    "compile_repeated_blocks", "set_attention_backend", "reset_attention_backend", "fuse_qkv_projections",
    "unfuse_qkv_projections", "enable_xformers_memory_efficient_attention", "disable_xformers_memory_efficient_attention",
    "enable_layerwise_casting", "enable_gradient_checkpointing", "disable_gradient_checkpointing", "tie_weights",
)  # fmt: skip


class ShownPart(nn.Module):
    """Stand-in for one component of a pipeline, with diffusers' interface but without parameters."""

    kind = ""

    def __init__(self, parts: PipelineParts) -> None:
        super().__init__()
        self.parts = parts

    @property
    def config(self) -> Any:
        """The checkpoint's config, with diffusers' defaults for missing entries; entries are also attributes."""
        import diffusers
        from diffusers.configuration_utils import FrozenDict

        parameters = inspect.signature(getattr(diffusers, CLASSES[self.kind]).__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        entries = dataclasses.asdict(getattr(self.parts.spec, self.kind))
        return FrozenDict(defaults | {name: value for name, value in entries.items() if name not in NOT_IN_CONFIG})

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the component computes in."""
        return self.parts.dtype(self.kind)

    @property
    def device(self) -> torch.device:
        """Device that the component computes on; its weights may be in host memory."""
        return self.parts.devices[0]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Change the dtype; the plan chooses device and memory format (see `WanPipeline.to`)."""
        dtypes = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
        if dtypes:
            self.parts.configure(**{f"{self.kind}_dtype": dtype_name(dtypes[0])})
        return self

    def cuda(self, device: Any = None) -> Self:
        """See `to`."""
        return self

    def cpu(self) -> Self:
        """See `to`."""
        return self

    def half(self) -> Self:
        """See `to`."""
        return self.to(torch.float16)

    def float(self) -> Self:
        """See `to`."""
        return self.to(torch.float32)

    def bfloat16(self) -> Self:
        """See `to`."""
        return self.to(torch.bfloat16)

    def num_parameters(self, *_: Any, **__: Any) -> int:
        """Return the number of the component's parameters."""
        memory = self.parts.models.memory
        shapes = {"transformer": memory.transformer_shapes, "vae": memory.vae_shapes}[self.kind]
        return sum(torch.Size(shape).numel() for shape in shapes.values())

    def forward(self, *_: Any, **__: Any) -> Any:
        """Raises NotImplementedError."""
        raise NotImplementedError(self._refusal("call"))

    def parameters(self, recurse: bool = True) -> NoReturn:
        """Raises NotImplementedError, because an empty result would be wrong.

        `named_parameters` yields nothing, which suits diffusers' hooks.
        """
        raise NotImplementedError(self._refusal("parameters"))

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Do nothing for False: the engine does not train. Raises NotImplementedError for True."""
        if requires_grad:
            raise NotImplementedError(self._refusal("gradients"))
        return self

    def state_dict(self, *_: Any, **__: Any) -> Any:
        """Raises NotImplementedError."""
        raise NotImplementedError(self._refusal("state_dict"))

    def load_state_dict(self, *_: Any, **__: Any) -> Any:
        """Raises NotImplementedError."""
        raise NotImplementedError(self._refusal("load_state_dict"))

    def __getattr__(self, name: str) -> Any:
        """Called only for names that do not exist: return a no-op, or raise AttributeError that says what to use."""
        if name in NOTHING_TO_DO:
            return lambda *_, **__: log.info("%s: nothing to do, the engine plans memory and speed itself.", name)
        if name.startswith("_"):
            return super().__getattr__(name)
        raise AttributeError(self._refusal(name))

    def _refusal(self, name: str) -> str:
        owner = CLASSES.get(self.kind, "UMT5EncoderModel")
        return (
            f"pipe.{self.kind} is run by wanduet's engine and has no {name}: load diffusers' own {owner} for that, and set "
            f"pipe.{self.kind} to it."
        ).replace("diffusers' own UMT5", "transformers' own UMT5")


class ShownTransformer(ShownPart):
    """Stand-in for the engine's transformer."""

    kind = "transformer"


class ShownVAE(ShownPart):
    """Stand-in for the engine's VAE, which decodes.

    Tiling and slicing have no effect: the plan chooses row tiles, which are exact.
    """

    kind = "vae"

    @property
    def device(self) -> torch.device:
        """Device that the VAE decodes on."""
        return self.parts.devices[1]

    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """Decode latents `[B, 16, T, h, w]` to video `[B, 3, 4T - 3, H, W]` in -1..1, in steps of 1/127.5.

        `z` is scaled as diffusers does: normalised latents times the config's `latents_std` plus `latents_mean`. The
        video has the dtype and the device of `z`.
        """
        from diffusers.models.autoencoders.vae import DecoderOutput

        spec = self.parts.spec.vae
        if z.ndim != 5 or z.shape[1] != spec.z_dim:
            raise ValueError(f"vae.decode takes latents [B, {spec.z_dim}, T, h, w], not {list(z.shape)}.")
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (spec.latents_mean, spec.latents_std))
        with self.parts.for_use():
            frames = decode_videos(self.parts, (z.float().cpu() - mean) / std)
        values = torch.stack([torch.from_numpy(video) for video in frames]).permute(0, 4, 1, 2, 3)
        sample = values.to(z.device).to(z.dtype).div_(127.5).sub_(1.0)
        return DecoderOutput(sample=sample) if return_dict else (sample,)


class ShownTextEncoder(ShownPart):
    """Stand-in for the engine's text encoder, which `pipe.encode_prompt` runs on the host."""

    kind = "text_encoder"

    @property
    def config(self) -> Any:
        """The checkpoint's config, as in transformers."""
        from transformers import UMT5Config

        return UMT5Config(**dataclasses.asdict(self.parts.spec.text_encoder), feed_forward_proj="gated-gelu")

    @property
    def device(self) -> torch.device:
        """The host."""
        return torch.device("cpu")

    def _refusal(self, name: str) -> str:
        if name == "call":
            return "pipe.text_encoder is run by wanduet's engine: call pipe.encode_prompt(prompt) instead."
        return super()._refusal(name)

    def num_parameters(self, *_: Any, **__: Any) -> int:
        """Return the number of the component's parameters."""
        folder = self.parts.base
        return 0 if folder is None else sum(torch.Size(s).numel() for s in folder.text_encoder.shapes.values())


SHOWN = {"transformer": ShownTransformer, "vae": ShownVAE, "text_encoder": ShownTextEncoder}


class ReplaceablePart:
    """Descriptor of a pipeline's component: the module that replaces it, or the stand-in for the engine's own.

    Assigning None, or deleting the attribute, restores the engine's own, which is loaded when it is needed.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __get__(self, pipe: Any, owner: type) -> Any:
        """Return the component, or this descriptor if accessed on the class."""
        return self if pipe is None else pipe._parts.given.get(self._kind, pipe._shown[self._kind])

    def __set__(self, pipe: Any, module: Any) -> None:
        """Replace the component from the next call on. Raises TypeError or ValueError."""
        pipe._parts.give(self._kind, module)

    def __delete__(self, pipe: Any) -> None:
        """Restore the engine's own component."""
        pipe._parts.give(self._kind, None)
