"""`WanPipeline.from_pretrained`: converts diffusers' keywords to engine settings, or refuses them by name."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wanduet.config import EngineConfig
from wanduet.doors.python.modules import check_scheduler
from wanduet.doors.python.parts import PipelineParts, dtype_name
from wanduet.errors import ModelNotFoundError
from wanduet.family.registry import RANDOM_SPECS
from wanduet.untrusted import first_line
from wanduet.weights.diffusers import COMPONENTS, ModelFolder, open_folder
from wanduet.weights.hub import local_model, open_model
from wanduet.weights.json_files import read_json

MODULES = ("tokenizer", "text_encoder", "vae", "transformer")
# They change how diffusers reads files. The engine has its own reader, which needs less memory than any of them.
WITHOUT_EFFECT = (
    "low_cpu_mem_usage", "disable_mmap", "offload_state_dict", "offload_folder", "load_connected_pipeline", "mirror",
    "use_flashpack", "trust_remote_code",
)  # fmt: skip
# Keywords that are refused, and what to use instead.
REFUSED = {
    "variant": "the usual files are read, and torch_dtype= converts them",
    "quantization_config": "vram_limit= (bytes) makes weights wait in host memory instead",
    "max_memory": "use vram_limit= (bytes a device)",
    "proxies": "set HTTPS_PROXY in the environment",
    "custom_pipeline": "use diffusers for pipelines of other code",
    "custom_revision": "use diffusers for pipelines of other code",
    "use_onnx": "only safetensors are read",
    "provider": "only safetensors are read",
    "sess_options": "only safetensors are read",
    "provider_options": "only safetensors are read",
    "output_loading_info": "a tensor that is missing or unknown is an error",
    "transformer_2": "it is Wan2.2's, and this runs Wan2.1",
    "boundary_ratio": "it is Wan2.2's, and this runs Wan2.1",
    "expand_timesteps": "it is Wan2.2's, and this runs Wan2.1",
    "image_encoder": "it is for image to video, and this runs text to video",
    "image_processor": "it is for image to video, and this runs text to video",
    "subfolder": "give the folder of the whole model",
    "from_flax": "only safetensors are read",
    "dduf_file": "give a folder or a hub id",
}
FILES = ("*.json", "tokenizer/*", *(f"{component}/*.safetensors" for component in COMPONENTS))  # no pickles
HUB = ("cache_dir", "token", "force_download")


@dataclass
class Options:
    """The keywords that were accepted, sorted by use."""

    modules: dict[str, Any] = field(default_factory=dict)
    scheduler: Any = None
    engine: dict[str, Any] = field(default_factory=dict)  # arguments of EngineConfig
    hub: dict[str, Any] = field(default_factory=dict)  # arguments of huggingface_hub.snapshot_download
    local_files_only: bool = False


def read_options(keywords: Mapping[str, Any], dtype: Any, vae_dtype: torch.dtype | None) -> Options:
    """Sort diffusers' keywords by use.

    Raises ValueError for a keyword that is refused, TypeError for one that diffusers does not have either.
    """
    found = Options()
    for name, value in keywords.items():
        if name in MODULES:
            found.modules[name] = value
        elif name == "scheduler":
            found.scheduler = value
        elif name == "local_files_only":
            found.local_files_only = bool(value)
        elif name in HUB:
            usual = value is None or (name == "token" and value is True) or (name == "force_download" and not value)
            found.hub |= {} if usual else {name: value}
        elif name == "use_safetensors":
            if value is False:
                raise ValueError("use_safetensors=False is not taken: only safetensors are read.")
        elif name == "device_map":
            found.engine |= _device_map(value)
        elif name in REFUSED:
            if value not in (None, False):
                raise ValueError(f"{name}= is not taken: {REFUSED[name]}.")
        elif name not in WITHOUT_EFFECT:
            known = (*MODULES, "scheduler", "local_files_only", *HUB, "device_map", "dtype", "revision", "devices")
            near = difflib.get_close_matches(name, (*known, *WITHOUT_EFFECT, *REFUSED, "torch_dtype"), 1)
            raise TypeError(f"from_pretrained has no keyword {name!r}" + (f"; is {near[0]!r} meant?" if near else "."))
    found.engine |= _dtypes(dtype, vae_dtype)
    return found


def _device_map(value: Any) -> dict[str, Any]:
    """Convert `device_map` to engine settings; None, `balanced` and `auto` leave the choice to the plan."""
    if value in (None, "balanced", "auto"):
        return {}
    if isinstance(value, Mapping):
        raise ValueError('device_map= takes no dict: use devices="vae=cuda:0,transformer=cuda:1".')
    return {"devices": device_name(value)}


def device_name(device: Any) -> str:
    """Return the engine's name of a device, given as `cuda:0`, `0`, a torch.device or a list in one string."""
    return f"cuda:{device}" if isinstance(device, int) else str(device)


def _dtypes(dtype: Any, vae_dtype: Any) -> dict[str, str]:
    """Convert dtypes to engine settings.

    `dtype` is the transformer's dtype, or a dict by component, whose `default` applies to all components that it does
    not name except the VAE. Raises ValueError.
    """
    named = dict(dtype) if isinstance(dtype, Mapping) else {"transformer": dtype}
    if unknown := set(named) - {"default", "tokenizer", "scheduler", *COMPONENTS}:
        raise ValueError(f"dtype= names {min(unknown)!r}; the parts are {', '.join(COMPONENTS)} and default.")
    transformer = named.get("transformer") or named.get("default") or torch.float32
    parts = {"transformer": transformer, "vae": vae_dtype or named.get("vae") or torch.float32}
    text = named.get("text_encoder")
    if text is None and dtype is not None and not isinstance(dtype, Mapping) and dtype_name(dtype) == "float32":
        text = dtype  # explicit float32; by default a large encoder computes in bfloat16
    if text is not None:
        parts["text_encoder"] = text
    return {f"{kind}_dtype": dtype_name(value) for kind, value in parts.items()}


def opener(config: EngineConfig, options: Options) -> Any:
    """Return a function that opens the model's folder once it is needed.

    `cache_dir`, `token` and `force_download` are passed to the hub's client.
    """

    def open_folder() -> ModelFolder | None:
        if config.model in RANDOM_SPECS:
            return None
        if not options.hub or local_model(config.model) is not None:
            return open_model(config.model, config.revision, fetch=not options.local_files_only)
        return _from_hub(config, options)

    return open_folder


def _from_hub(config: EngineConfig, options: Options) -> ModelFolder:
    from huggingface_hub import snapshot_download

    try:
        path = Path(
            snapshot_download(
                config.model, revision=config.revision, local_files_only=options.local_files_only,
                allow_patterns=[*FILES], **options.hub,
            )
        )  # fmt: skip
    except Exception as error:  # the type depends on what failed: network, permissions, name, cache
        raise ModelNotFoundError(
            f"{config.model} cannot be fetched: {first_line(error)}", hint="Check its name, and token=."
        ) from error
    return open_folder(path, config.model, path.name)


def load_scheduler(parts: PipelineParts) -> Any:
    """Return the checkpoint's scheduler; for random weights, Wan's official one.

    Raises ModelNotFoundError if it is unusable.
    """
    import diffusers

    folder = None if parts.base is None else parts.base.path / "scheduler"
    if folder is None or not folder.is_dir():
        return diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    name = str(read_json(folder / "scheduler_config.json").get("_class_name", "UniPCMultistepScheduler"))
    known = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    try:
        if known is None:
            raise TypeError(f"diffusers has no {name}.")
        check_scheduler(scheduler := known.from_pretrained(str(folder), local_files_only=True))
    except TypeError as error:
        raise ModelNotFoundError(
            f"{folder}: {name} is not supported ({error})",
            hint="Give another with scheduler=, say UniPCMultistepScheduler.",
        ) from None
    return scheduler
