"""LoRA of a pipeline, by diffusers' names: which are loaded, active and fused, and with what strengths the next call has them.

diffusers adds the products of a LoRA in each forward, or fuses them into weights. Here both are merged into the weights at the
next call, from the base as the model has it, so that taking them out again gives the base bit for bit.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wanduet.weights.adapters.adapter import Adapter

Part = tuple[Adapter, float]  # with its strength
log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Loaded:
    adapter: Adapter
    weight: float = 1.0  # that of `set_adapters`


class PipelineLoras:
    """The LoRAs of a transformer."""

    def __init__(self) -> None:
        self.loaded: dict[str, _Loaded] = {}  # by adapter name
        self.active: list[str] = []
        self.enabled = True
        self.fused: dict[str, Part] = {}  # by adapter name; `unfuse` takes them out
        self._kept: list[Part] = []  # fused, and then unloaded: they stay

    def parts(self, scale: float = 1.0) -> list[Part]:
        """Return what the weights have besides the base; `scale` multiplies the strengths of those that are not fused.

        Raises ValueError if LoRAs are active that diffusers would leave out, as others are fused.
        """
        if not self.enabled:
            return self._kept
        if not self.fused:
            return [*self._kept, *((self.loaded[n].adapter, self.loaded[n].weight * scale) for n in self.active)]
        if idle := [name for name in self.active if name not in self.fused]:
            raise ValueError(
                f"The LoRA {idle[0]!r} is active but not fused, and has no effect while {min(self.fused)!r} is fused: call "
                "fuse_lora for it too, or unfuse_lora."
            )
        return [*self._kept, *self.fused.values()]

    def fields(self, scale: float = 1.0) -> dict[str, Any]:
        """Return the field of a request that `parts` gives it; {} for none. Raises ValueError."""
        loras = [{"name": str(a.path), "strength": by, "sha256": a.sha256} for a, by in self.parts(scale)]
        return {"loras": loras} if loras else {}

    def by_hash(self) -> dict[str, Adapter]:
        """Return all LoRAs by their hashes."""
        fused = [*self._kept, *self.fused.values()]
        return {a.sha256: a for a in (*(one.adapter for one in self.loaded.values()), *(a for a, _ in fused))}

    def new_name(self) -> str:
        """Return diffusers' name for the next LoRA that is loaded without one."""
        count = len(self.loaded)
        while f"default_{count}" in self.loaded:
            count += 1
        return f"default_{count}"

    def load(self, name: str, adapter: Adapter) -> None:
        """Add a LoRA and make it the only active one; what is fused is taken out."""
        self.fused.clear()
        self.loaded[name] = _Loaded(adapter)
        self.active = [name]

    def exchange(self, name: str, adapter: Adapter) -> None:
        """Put a LoRA, at strength 1, in the place of the one of that name."""
        self.loaded[name] = _Loaded(adapter)

    def set(self, names: Sequence[str], weights: Sequence[float]) -> None:
        """Make these the active ones, with these strengths."""
        self.check(names)
        for name, weight in zip(names, weights, strict=True):
            self.loaded[name].weight = weight
        self.active = list(names)

    def fuse(self, scale: float, names: Sequence[str]) -> None:
        """Fuse those that are not fused yet with their strengths; first, as in diffusers, `scale` multiplies all active ones'."""
        self.check(names)
        for name in self.active:
            self.loaded[name].weight *= scale
        for name in names:
            self.fused.setdefault(name, (self.loaded[name].adapter, self.loaded[name].weight))

    def delete(self, names: Sequence[str]) -> None:
        """Forget these; if none is active any more, the first of the others by name becomes active, as in diffusers."""
        self.check(names)
        if fused := [name for name in names if name in self.fused]:
            raise ValueError(
                f"The LoRA {fused[0]!r} is fused: call unfuse_lora first, or unload_lora_weights, which leaves it fused."
            )
        was_active = bool(self.active)
        for name in dict.fromkeys(names):
            del self.loaded[name]
        self.active = [name for name in self.active if name in self.loaded]
        if was_active and not self.active and self.loaded:
            self.active = [min(self.loaded)]
            log.warning("The active LoRA is deleted: %r becomes the active one.", self.active[0])

    def unload(self) -> None:
        """Forget all; what is fused stays in the weights."""
        self._kept += self.fused.values()
        self.loaded, self.active, self.enabled, self.fused = {}, [], True, {}

    def check(self, names: Sequence[str]) -> None:
        """Raise ValueError for a name that is not loaded."""
        if missing := [name for name in names if name not in self.loaded]:
            raise ValueError(f"No LoRA {missing[0]!r} is loaded; there are: {', '.join(self.loaded) or 'none'}.")
