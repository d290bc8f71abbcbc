"""Uses modules that a program passes to `WanPipeline` as weights of the engine's own models.

diffusers' transformer or VAE never runs: the engine reads its tensors and config, and computes with a copy. So only the
plain classes are accepted; a subclass, a LoRA or a hook would have no effect, and is refused.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wanduet.errors import WanduetError
from wanduet.family.spec import TransformerSpec, VAESpec, check_consistent
from wanduet.family.wan21 import WAN_1_3B
from wanduet.meta.init import meta_init
from wanduet.models.dit.model import WanTransformer
from wanduet.models.vae.model import WanVAE
from wanduet.weights.diffusers import ModelFolder
from wanduet.weights.source import TensorInfo, WeightSource

CLASSES = {"transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan"}
MERGE_LORA = (
    "take its LoRA out with diffusers' `unload_lora_weights` and give that to wanduet's pipe.load_lora_weights, or fuse it "
    "first (`fuse_lora`, then `unload_lora_weights`)"
)
SAMPLES = 32  # elements sampled from each tensor, to detect in-place changes of weights


def unwrapped(module: Any) -> Any:
    """Return the module that `torch.compile` has wrapped, or the module itself."""
    # Not getattr: another wrapper may forward attribute access, and would be mistaken for the wrapped module.
    return module._modules.get("_orig_mod", module) if isinstance(module, nn.Module) else module


def check_module(kind: str, module: Any) -> None:
    """Raise TypeError or ValueError, with a one-sentence message, for a module that the engine cannot reproduce."""
    import diffusers

    name = CLASSES[kind]
    if type(module) is not getattr(diffusers, name):
        raise TypeError(
            f"pipe.{kind} takes diffusers' {name} (also from torch.compile), not {type(module).__name__}: the engine reads "
            "its weights and runs them itself, so that another class's own forward would not be used."
        )
    if any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()):
        raise ValueError(f"pipe.{kind} has forward hooks, which would not run: use callback_on_step_end= instead.")
    if any(tensor.is_meta for tensor in module.state_dict(keep_vars=True).values()):
        raise ValueError(
            f"pipe.{kind} has its weights on the meta device: load it without offloading; the engine places it itself."
        )
    plain = {"WanAttnProcessor", "WanAttnProcessor2_0"}
    others = {type(p).__name__ for p in getattr(module, "attn_processors", {}).values()} - plain
    if others:
        raise ValueError(
            f"pipe.{kind} has the attention processor {min(others)}, which would not run: the engine chooses attention itself."
        )
    spec = _spec_of(kind, module)
    with meta_init():
        ours = WanTransformer(spec) if isinstance(spec, TransformerSpec) else WanVAE(spec)
    try:
        ModuleTensors(kind, module).check({name: tuple(p.shape) for name, p in ours.named_parameters()})
    except WanduetError as error:
        raise ValueError(f"pipe.{kind} cannot be used: {error.message.rstrip('.')}; {MERGE_LORA}.") from None


def _spec_of(kind: str, module: Any) -> TransformerSpec | VAESpec:
    try:
        if kind == "transformer":
            return WAN_1_3B.transformer.with_config(module.config)
        return WAN_1_3B.vae.with_config(module.config)
    except WanduetError as error:
        raise ValueError(f"pipe.{kind} is not of a Wan2.1 text-to-video model: {error.message}") from None


def stamp(module: nn.Module) -> str:
    """Return a digest that changes with a module's weights, also in place.

    It covers each tensor's address, version counter and dtype, and a sample of its elements.
    """
    digest = hashlib.sha256()
    for name, tensor in module.state_dict(keep_vars=True).items():
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].float().cpu()
        version = -1 if tensor.is_inference() else tensor._version
        digest.update(f"{name} {tensor.data_ptr()} {version} {tensor.dtype}".encode() + some.numpy().tobytes())
    return digest.hexdigest()


class ModuleTensors(WeightSource):
    """A weight source that reads a module's tensors instead of a component's files."""

    def __init__(self, kind: str, module: nn.Module) -> None:
        super().__init__(kind)
        self._module = module
        self.tensors = {
            name: TensorInfo(Path(), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.").upper())
            for name, tensor in module.state_dict().items()
        }

    def iterate(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the named tensors with their current values."""
        state = self._module.state_dict()
        yield from ((name, state[name]) for name in names if name in state)

    def fingerprint(self) -> str:
        """Return a digest of the current weights."""
        return stamp(self._module)


@dataclass(frozen=True)
class GivenFolder(ModelFolder):
    """A model folder in which modules replace some components, or all of them if there is no folder."""

    def __post_init__(self) -> None:
        """Skip the checks of files: they ran when the folder was opened, or there is no folder."""


def folder_with(base: ModelFolder | None, modules: Mapping[str, Any]) -> ModelFolder:
    """Return a folder in which the given modules (`transformer`, `vae`, `text_encoder`) replace its own components.

    Raises ModelNotFoundError for modules that do not fit together.
    """
    path = Path("given to WanPipeline") if base is None else base.path
    if base is None:
        made = GivenFolder(path, "given modules")
    else:
        made = GivenFolder(path, base.name, base.revision, base.parts)
    spec = replace(WAN_1_3B, name="given modules") if base is None else base.spec
    for kind in CLASSES:
        if (module := modules.get(kind)) is not None:
            changed: dict[str, Any] = {kind: _spec_of(kind, module)}
            spec = replace(spec, **changed)
            made.__dict__[kind] = ModuleTensors(kind, module)
        elif base is not None:
            made.__dict__[kind] = getattr(base, kind)
    if (encoder := modules.get("text_encoder")) is not None and hasattr(encoder, "config"):
        spec = replace(spec, text_encoder=WAN_1_3B.text_encoder.with_config(encoder.config.to_dict()))
    check_consistent(path, spec)
    both = json.dumps([made.transformer.fingerprint(), made.vae.fingerprint(), str(spec)])
    made.__dict__.update(spec=spec, fingerprint=hashlib.sha256(both.encode()).hexdigest())
    return made


def check_text_encoder(module: Any) -> None:
    """Raise TypeError for an object that does not behave as transformers' text encoder."""
    if not (callable(module) and hasattr(module, "parameters") and hasattr(module, "config")):
        raise TypeError(
            f"pipe.text_encoder takes transformers' UMT5EncoderModel, or one with its call, not {type(module).__name__}."
        )


def check_scheduler(scheduler: Any) -> None:
    """Raise TypeError for an object that diffusers' own loop could not step."""
    lacks = [name for name in ("set_timesteps", "set_begin_index", "step") if not hasattr(scheduler, name)]
    if lacks:
        raise TypeError(
            f"pipe.scheduler takes a diffusers scheduler for flow matching, for example UniPCMultistepScheduler, "
            f"not {type(scheduler).__name__}: it has no {lacks[0]}."
        )


def module_dtype(module: Any) -> torch.dtype:
    """Return the dtype that a module computes in."""
    dtype = getattr(module, "dtype", None)
    if isinstance(dtype, torch.dtype):
        return dtype
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
