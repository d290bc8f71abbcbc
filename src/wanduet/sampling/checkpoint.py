"""Checkpoints of a denoise: latents and the states of sampler and predictor after a step, from which a killed job
resumes.

Each denoise has one safetensors file, replaced atomically; the previous one is kept beside it. The file has a checksum
over its tensors. A file that is damaged or contains NaN or infinity is ignored.
"""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wanduet.folders import replace_file
from wanduet.sampling.samplers import State

KEY = "wanduet_checkpoint"

# Yields a temporary file beside a path; if the block succeeds, the file is moved to the path and synced to disk.
Output = Callable[[Path], AbstractContextManager[Path]]


@dataclass(frozen=True, slots=True)
class DenoiseCheckpoint:
    """Latents `[B, 16, T, h, w]` float32 and the states of sampler and predictor after `step` steps."""

    step: int
    latents: Tensor
    sampler_state: State
    about: dict[str, Any]  # what the checkpoint belongs to: the resolved request, the seed
    record: dict[str, Any] = field(default_factory=dict)  # how the steps were made
    writer: str = ""  # the id of the job that made it; `save` stores that of `Checkpoints` instead
    predictor_state: State = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one denoise, identified by `key`: a digest of everything that determines the latents.

    Several processes may run the same denoise at once. Each replaces the files atomically, and removes only files that
    it wrote or resumed from.
    """

    def __init__(self, folder: Path, key: str, output: Output, writer: str = "") -> None:
        """`output` writes a file atomically (see Output), and may raise OSError or WanduetError. `writer` is the id of
        the job that runs this denoise; objects with the same id own the same files."""
        self.path = folder / f"{key}.safetensors"
        self.previous = folder / f"{key}.previous.safetensors"
        self._output = output
        self._writers = {writer}
        self._writer = writer

    def save(self, checkpoint: DenoiseCheckpoint) -> bool:
        """Write a checkpoint and sync it to disk. The last good checkpoint stays readable at every moment.

        Return False, and write nothing, if it contains NaN or infinity. Raises OSError, or the errors of `output`.
        """
        tensors: dict[str, Tensor] = {"latents": checkpoint.latents.detach().cpu().contiguous()}
        scalars = _flatten("sampler", checkpoint.sampler_state, tensors)
        predictor = _flatten("predictor", checkpoint.predictor_state, tensors)
        if not _finite(tensors):
            return False
        about = {
            "step": checkpoint.step,
            "sampler": scalars,
            "predictor": predictor,
            "about": checkpoint.about,
            "record": checkpoint.record,
            "writer": self._writer,
            "sha256": _digest(tensors),
        }
        with self._output(self.path) as partial:
            try:
                save_file(tensors, partial, {KEY: json.dumps(about)})
            except SafetensorError as error:  # safetensors raises it for a full disk, too
                raise OSError(str(error)) from error
            with suppress(FileNotFoundError):  # there is no checkpoint yet, or another process has just moved it
                replace_file(self.path, self.previous)
        return True

    def load(self, own_only: bool = False) -> DenoiseCheckpoint | None:
        """Return the newest checkpoint that is undamaged and finite, or None. `own_only` skips those of other
        writers."""
        for path in (self.path, self.previous):
            checkpoint = _read(path)
            if checkpoint is not None and not (own_only and checkpoint.writer not in self._writers):
                return checkpoint
        return None

    def adopt(self) -> None:
        """Treat the current files as this denoise's own, so that `remove` deletes them. Call it when resuming from
        them."""
        self._writers.update(writer for path in (self.path, self.previous) if (writer := _writer_of(path)))

    def remove(self) -> None:
        """Delete the checkpoints of this denoise, except other writers' files. Ignore errors of the file system."""
        for path in (self.path, self.previous):
            with suppress(OSError):
                writer = _writer_of(path)
                if writer is None or writer in self._writers:  # None: damaged, no job can resume from it
                    path.unlink(missing_ok=True)


def remove_abandoned(folder: Path, days: float) -> int:
    """Delete the files that were not changed for `days` days, and return their number."""
    removed = 0
    for path in folder.glob("*.*") if folder.is_dir() else ():
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > 86400 * days:
                path.unlink()
                removed += 1
    return removed


def find_checkpoints(folder: Path) -> list[DenoiseCheckpoint]:
    """Return all undamaged checkpoints in a folder, newest first."""
    paths = sorted(folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime, reverse=True)
    found = (_read(path) for path in paths)
    return [checkpoint for checkpoint in found if checkpoint is not None]


def _flatten(owner: str, state: State, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Copy the tensors of a state into `tensors`, and return the state with names in place of tensors."""
    return {name: _named(f"{owner}.{name}", value, tensors) for name, value in state.items()}


def _named(name: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    # Not a function within the other: one that calls itself is garbage only to the collector, and `tensors` with it.
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, list):
        return [_named(f"{name}.{i}", item, tensors) for i, item in enumerate(value)]
    return value


def _unflatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return tensors[value["tensor"]]
    if isinstance(value, list):
        return [_unflatten(item, tensors) for item in value]
    return value


def _read(path: Path) -> DenoiseCheckpoint | None:
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[KEY])
            # Clone: Windows can neither remove nor replace a file that is still mapped.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
        if _digest(tensors) != about["sha256"] or not _finite(tensors):
            return None
        sampler, predictor = (
            {name: _unflatten(value, tensors) for name, value in state.items()}
            for state in (about["sampler"], about.get("predictor", {}))
        )
        made = about.get("record", {}), about.get("writer", "")
        return DenoiseCheckpoint(int(about["step"]), tensors["latents"], sampler, about["about"], *made, predictor)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError, RuntimeError):
        return None  # RuntimeError: another process moved the file while it was being opened


def _writer_of(path: Path) -> str | None:
    """Return the writer of a checkpoint; None for a damaged file, "" for a missing one (another process may move
    it)."""
    try:
        with safe_open(path, framework="pt") as file:
            return str(json.loads((file.metadata() or {})[KEY]).get("writer", ""))
    except (FileNotFoundError, RuntimeError):
        return ""
    except (OSError, SafetensorError, KeyError, ValueError, AttributeError):
        return None


def _finite(tensors: dict[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
