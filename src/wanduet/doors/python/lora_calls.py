"""diffusers' calls for LoRA, of both pipelines."""

import logging
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from torch import Tensor

from wanduet.doors.python.arguments import number
from wanduet.doors.python.lora_files import find_lora, read_options, read_state_dict
from wanduet.doors.python.parts import PipelineParts
from wanduet.weights.adapters.reader import read_adapter

COMPONENT = "transformer"  # the only one that has LoRA
log = logging.getLogger(__name__)


class LoraCalls:
    """diffusers' calls for LoRA. They change the next call of this pipeline, and of those that share its transformer.

    In a callback, those that change something raise PipelineBusyError.
    """

    _parts: PipelineParts

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: "str | PathLike[str] | Mapping[str, Tensor]",
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load a LoRA, which becomes the only active one, at strength 1, until `set_adapters`.

        It is a file, a folder, a hub id or tensors by name, in any trainer's spelling; nothing of it is left out silently.
        `adapter_name`: None for `default_0`, `default_1`, ... `hotswap=True` exchanges the LoRA of that name. Keywords:
        `weight_name` (the file's name in a folder or on the hub), `subfolder`, `use_safetensors`, and those of the hub's client:
        `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

        Unlike in diffusers, `dora_scale` is used. A few-step LoRA does not change the scheduler, the number of steps or the
        guidance: as in diffusers, set `pipe.scheduler` and the call's arguments.

        Raises ValueError for a name that is in use (with `hotswap`: that is not) and a keyword that is not supported,
        TypeError for one that diffusers does not have, ModelNotFoundError, and WeightsError for a LoRA of another model.
        """
        given = pretrained_model_name_or_path_or_dict
        options = read_options(kwargs)
        with self._parts.at_work():
            loras, memory = self._parts.loras, self._parts.models.memory
            name = loras.new_name() if adapter_name is None else adapter_name
            if hotswap and (name not in loras.loaded or name in loras.fused):
                raise ValueError(f"hotswap=True exchanges a LoRA that is loaded and not fused, and {name!r} is none.")
            if name in loras.loaded and not hotswap:
                raise ValueError(f"The adapter name {name!r} is in use: give another adapter_name=, or hotswap=True.")
            about = memory.spec.transformer, memory.transformer_shapes
            if isinstance(given, Mapping):
                adapter = read_state_dict(given, *about)
            else:
                adapter = read_adapter(find_lora(given, options), *about)
            for reason, count in adapter.ignored.items():
                log.warning("%s: %d tensors ignored: %s.", adapter.name, count, reason)
            if hotswap:
                loras.exchange(name, adapter)
            else:
                loras.load(name, adapter)

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: Any = None) -> None:
        """Make these LoRAs the active ones, with these strengths: a number for all, or a list; None is 1.

        A strength may be `{"transformer": number}`; strengths by layer are not supported. What is fused keeps its strength
        until `unfuse_lora`. Raises ValueError.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = adapter_weights if isinstance(adapter_weights, list) else [adapter_weights] * len(names)
        if len(weights) != len(names):
            raise ValueError(f"adapter_weights has {len(weights)} values for {len(names)} adapters.")
        with self._parts.at_work():
            self._parts.loras.set(names, [_strength(weight) for weight in weights])

    def fuse_lora(
        self,
        components: Sequence[str] = (COMPONENT,),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        """Fix the strengths of the active LoRAs, or of those named, until `unfuse_lora`.

        `lora_scale` multiplies the strengths of the active ones, also after `unfuse_lora`. While one is fused, the scale of a
        call has no effect, and an active one that is not fused is refused at the call. LoRAs that are fused stay after
        `unload_lora_weights`. `safe_fusing` needs nothing: files with NaN are never loaded. Raises ValueError.
        """
        _check_components(components)
        scale = number("lora_scale", lora_scale)
        with self._parts.at_work():
            loras = self._parts.loras
            loras.fuse(scale, loras.active if adapter_names is None else adapter_names)

    def unfuse_lora(self, components: Sequence[str] = (COMPONENT,)) -> None:
        """Undo `fuse_lora` for the LoRAs that are loaded: those that are active apply as before. Raises ValueError."""
        _check_components(components)
        with self._parts.at_work():
            self._parts.loras.fused.clear()

    def unload_lora_weights(self) -> None:
        """Forget all LoRAs; the next call has the base bit for bit. Those that are fused stay in the weights for good."""
        with self._parts.at_work():
            self._parts.loras.unload()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Forget these LoRAs. If none is active any more, the first of the others by name becomes active.

        Raises ValueError for one that is not loaded, or is fused.
        """
        with self._parts.at_work():
            self._parts.loras.delete([adapter_names] if isinstance(adapter_names, str) else adapter_names)

    def disable_lora(self) -> None:
        """Leave out all LoRAs that are loaded, also those loaded later, until `enable_lora`."""
        with self._parts.at_work():
            self._parts.loras.enabled = False

    def enable_lora(self) -> None:
        """Undo `disable_lora`."""
        with self._parts.at_work():
            self._parts.loras.enabled = True

    def get_active_adapters(self) -> list[str]:
        """Return the names of the active LoRAs."""
        return list(self._parts.loras.active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the names of all LoRAs that are loaded, as `{"transformer": names}`; {} for none."""
        names = list(self._parts.loras.loaded)
        return {COMPONENT: names} if names else {}

    @property
    def fused_loras(self) -> set[str]:
        """The names of the fused LoRAs that `unfuse_lora` takes out."""
        return set(self._parts.loras.fused)

    @property
    def num_fused_loras(self) -> int:
        """The number of `fused_loras`."""
        return len(self._parts.loras.fused)

    def set_lora_device(self, adapter_names: list[str], device: Any) -> None:
        """Do nothing: LoRAs are in host memory, and what they change is in the weights. Raises ValueError for a name that is
        not loaded."""
        self._parts.loras.check(adapter_names)

    def enable_lora_hotswap(self, target_rank: int = 128, check_compiled: str = "error") -> None:
        """Do nothing: LoRAs of all ranks are exchanged without compiling anything."""


def _strength(weight: Any) -> float:
    if isinstance(weight, Mapping):
        if unknown := sorted(set(weight) - {COMPONENT}):
            raise ValueError(f"adapter_weights names {unknown[0]!r}; only the {COMPONENT} has LoRA.")
        weight = weight.get(COMPONENT)
    if isinstance(weight, Mapping):
        raise ValueError("adapter_weights takes one number for each adapter, not one for each layer.")
    return 1.0 if weight is None else number("adapter_weights", weight)


def _check_components(components: Sequence[str]) -> None:
    if list(components) != [COMPONENT]:
        raise ValueError(f"components={components!r} is not supported: only the {COMPONENT} has LoRA.")
