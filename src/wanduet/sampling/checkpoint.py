"""A denoise on disk: latents and solver history after a step, so that a killed job goes on from there.

One safetensors file a denoise, replaced atomically; the one before is kept beside it until the new one is
complete. A checksum over the tensors is stored with them; a damaged file is ignored.
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wanduet.sampling.samplers import State


@dataclass(frozen=True, slots=True)
class DenoiseCheckpoint:
    """Latents `[B, 16, T, h, w]` float32 after `step` steps, and the sampler's state then."""

    step: int
    latents: Tensor
    sampler_state: State
    about: dict[str, Any]  # what the checkpoint belongs to: the resolved request, its seed


class Checkpoints:
    """The checkpoints of one denoise, known by `key` (a digest of request, seed and model)."""

    def __init__(self, folder: Path, key: str) -> None:
        self.path = folder / f"{key}.safetensors"
        self.previous = folder / f"{key}.previous.safetensors"

    def save(self, checkpoint: DenoiseCheckpoint) -> None:
        """Write durably. The last good checkpoint stays readable at every moment."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {"latents": checkpoint.latents.detach().cpu().contiguous()}
        scalars = _flatten(checkpoint.sampler_state, tensors)
        about = {"step": checkpoint.step, "sampler": scalars, "about": checkpoint.about, "sha256": _digest(tensors)}
        partial = self.path.with_suffix(".partial")
        try:
            save_file(tensors, partial, {"wanduet_checkpoint": json.dumps(about)})
        except SafetensorError as error:  # what a full disk becomes on its way through safetensors
            raise OSError(str(error)) from error
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        if self.path.exists():
            os.replace(self.path, self.previous)
        os.replace(partial, self.path)

    def load(self) -> DenoiseCheckpoint | None:
        """The newest checkpoint that is whole, or None."""
        for path in (self.path, self.previous):
            checkpoint = _read(path)
            if checkpoint is not None:
                return checkpoint
        return None

    def remove(self) -> None:
        """Forget this denoise; a folder that cannot be written keeps its files."""
        for path in (self.path, self.previous, self.path.with_suffix(".partial")):
            with suppress(OSError):
                path.unlink(missing_ok=True)


def remove_abandoned(folder: Path, days: float) -> int:
    """Delete what nobody came back for in so many days; returns how many files went."""
    removed = 0
    for path in folder.glob("*.*") if folder.is_dir() else ():
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > 86400 * days:
                path.unlink()
                removed += 1
    return removed


def find_checkpoints(folder: Path) -> list[DenoiseCheckpoint]:
    """Every whole checkpoint in a folder, newest first."""
    paths = sorted(folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime, reverse=True)
    found = (_read(path) for path in paths)
    return [checkpoint for checkpoint in found if checkpoint is not None]


def _flatten(state: State, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Move the state's tensors into `tensors`, leaving their names in place."""

    def visit(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value.detach().cpu().clone().contiguous()
            return {"tensor": name}
        if isinstance(value, list):
            return [visit(f"{name}.{i}", item) for i, item in enumerate(value)]
        return value

    return {name: visit(f"sampler.{name}", value) for name, value in state.items()}


def _unflatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return tensors[value["tensor"]]
    if isinstance(value, list):
        return [_unflatten(item, tensors) for item in value]
    return value


def _read(path: Path) -> DenoiseCheckpoint | None:
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["wanduet_checkpoint"])
            # Copies: Windows neither removes nor replaces a file that is still mapped.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
        if _digest(tensors) != about["sha256"]:
            return None
        state = {name: _unflatten(value, tensors) for name, value in about["sampler"].items()}
        return DenoiseCheckpoint(int(about["step"]), tensors["latents"], state, about["about"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
