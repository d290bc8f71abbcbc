"""Finds the LoRA that a program names as for diffusers: a file, a folder, a hub id, or tensors by name."""

import difflib
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from wanduet.doors.python.loading import HUB, REFUSED
from wanduet.errors import ModelNotFoundError
from wanduet.family.spec import TransformerSpec
from wanduet.untrusted import first_line
from wanduet.weights.adapters.adapter import Adapter
from wanduet.weights.adapters.files import CONFIG
from wanduet.weights.adapters.reader import read_adapter

WITHOUT_EFFECT = ("low_cpu_mem_usage",)
OWN = ("weight_name", "subfolder", "use_safetensors", "revision", "local_files_only")
# Files beside a LoRA that are none, as diffusers has it.
OTHERS = ("scheduler", "optimizer", "checkpoint")
log = logging.getLogger(__name__)


@dataclass
class LoraOptions:
    """Which file of a folder or repository is meant, and `hub`: keywords of the hub's client."""

    weight_name: str | None = None
    subfolder: str | None = None
    use_safetensors: bool | None = None
    hub: dict[str, Any] = field(default_factory=dict)


def read_options(keywords: Mapping[str, Any]) -> LoraOptions:
    """Sort the keywords of `load_lora_weights`.

    Raises ValueError for a keyword that is refused, TypeError for one that diffusers does not have either.
    """
    for name in keywords:
        if name not in (*OWN, *HUB, *WITHOUT_EFFECT, "proxies", "load_into_transformer_2"):
            near = difflib.get_close_matches(name, (*OWN, *HUB, "adapter_name", "hotswap"), 1)
            raise TypeError(
                f"load_lora_weights has no keyword {name!r}" + (f"; is {near[0]!r} meant?" if near else ".")
            )
    if keywords.get("load_into_transformer_2"):
        raise ValueError(f"load_into_transformer_2= is not taken: {REFUSED['transformer_2']}.")
    if keywords.get("proxies"):
        raise ValueError(f"proxies= is not taken: {REFUSED['proxies']}.")
    own = {name: keywords[name] for name in ("weight_name", "subfolder", "use_safetensors") if name in keywords}
    hub = {n: keywords[n] for n in (*HUB, "revision", "local_files_only") if keywords.get(n) is not None}
    return LoraOptions(**own, hub=hub)


def find_lora(given: "str | PathLike[str]", options: LoraOptions) -> Path:
    """Return the path of a LoRA's file, fetched from the hub if `given` is neither a file nor a folder.

    Raises ModelNotFoundError, ValueError.
    """
    path = Path(given)
    if path.is_file():
        if options.weight_name not in (None, path.name):
            raise ValueError(f"{path} is a file, and weight_name={options.weight_name!r} names another.")
        return path
    if path.is_dir():
        folder = path / (options.subfolder or "")
        files = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        name = options.weight_name or _guess(str(folder), files, options)
        if not (folder / name).is_file():
            raise ModelNotFoundError(f"There is no file {folder / name}.")
        return folder / name
    return _fetch(str(given), options)


def read_state_dict(
    tensors: Mapping[str, Any], spec: TransformerSpec, shapes: Mapping[str, tuple[int, ...]]
) -> Adapter:
    """Read tensors by name as a file with them would be read. Raises ValueError, and as `read_adapter` does."""
    from safetensors.torch import save_file

    if not tensors:
        raise ValueError("A LoRA's state dict must not be empty.")
    if wrong := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"A LoRA's state dict has only tensors: {wrong[0]!r} is none.")
    with TemporaryDirectory(prefix="wanduet-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "state_dict.safetensors"
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, path)
        return read_adapter(path, spec, shapes)


def _guess(where: str, files: list[str], options: LoraOptions) -> str:
    """Return the file that diffusers would take; the first by name of several."""
    endings = [
        ending
        for ending, is_safe in ((".safetensors", True), (".bin", False))
        if options.use_safetensors in (None, is_safe)
    ]
    for ending in endings:
        found = sorted(name for name in files if name.endswith(ending) and not any(part in name for part in OTHERS))
        usual = [name for name in found if name.endswith(f"pytorch_lora_weights{ending}")]
        if len(usual or found) > 1:
            log.warning("%s has several files: %s is taken; weight_name= names another.", where, (usual or found)[0])
        if found:
            return (usual or found)[0]
    raise ModelNotFoundError(f"{where} has no LoRA: no file *{' or *'.join(endings)}.", hint="Give weight_name=.")


def _fetch(repository: str, options: LoraOptions) -> Path:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    subfolder, hub = options.subfolder or "", options.hub
    if options.weight_name is None and hub.get("local_files_only"):
        raise ValueError("Give weight_name= with local_files_only=True: the repository's files cannot be listed.")
    try:
        name = options.weight_name
        if name is None:
            listed = HfApi().model_info(repository, revision=hub.get("revision"), token=hub.get("token")).siblings or []
            paths = [PurePosixPath(file.rfilename) for file in listed]
            name = _guess(repository, [p.name for p in paths if p.parent == PurePosixPath(subfolder)], options)
        path = Path(hf_hub_download(repository, name, subfolder=subfolder or None, **hub))
        if path.stem == "adapter_model":  # PEFT's, whose scales are in a file beside it
            with suppress(EntryNotFoundError):
                hf_hub_download(repository, CONFIG, subfolder=subfolder or None, **hub)
        return path
    except ModelNotFoundError:
        raise
    except Exception as error:  # the type depends on what failed: network, permissions, name, cache
        raise ModelNotFoundError(
            f"{repository} is neither a file nor a folder, and cannot be fetched: {first_line(error)}",
            hint="Check its name, and token=.",
        ) from error
