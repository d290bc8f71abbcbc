"""A denoise on disk: latents and solver history after a step, so that a killed job goes on from there.

One safetensors file a denoise, replaced atomically; the one before is kept beside it until the new one is
complete. A checksum over the tensors is stored with them; a file that is damaged or holds NaN is ignored.
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

# Yields an empty file beside a path, under a name of its own; when the block ends well, that file is durably at the path.
Output = Callable[[Path], AbstractContextManager[Path]]


@dataclass(frozen=True, slots=True)
class DenoiseCheckpoint:
    """Latents `[B, 16, T, h, w]` float32 after `step` steps, and the states of sampler and predictor then."""

    step: int
    latents: Tensor
    sampler_state: State
    about: dict[str, Any]  # what the checkpoint belongs to: the resolved request, its seed
    record: dict[str, Any] = field(default_factory=dict)  # how the steps were made
    writer: str = ""  # who made them; `save` writes its own
    predictor_state: State = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one denoise, known by `key`: a digest of all that has a say in the latents.

    Several processes may make the same denoise at once. Each replaces the files atomically, and removes only those
    that it has written itself, or gone on from.
    """

    def __init__(self, folder: Path, key: str, output: Output, writer: str = "") -> None:
        """`output` writes a file atomically (see Output), and may raise OSError or WanduetError. `writer` names whoever
        makes this denoise; objects with one name own the same files."""
        self.path = folder / f"{key}.safetensors"
        self.previous = folder / f"{key}.previous.safetensors"
        self._output = output
        self._writers = {writer}
        self._writer = writer

    def save(self, checkpoint: DenoiseCheckpoint) -> bool:
        """Write durably; the last good checkpoint stays readable at every moment. False, and nothing is written, if it
        holds NaN or infinity. Raises OSError, or what `output` raises."""
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
            except SafetensorError as error:  # what a full disk becomes on its way through safetensors
                raise OSError(str(error)) from error
            with suppress(FileNotFoundError):  # there is none yet, or another process has just moved it
                replace_file(self.path, self.previous)
        return True

    def load(self, own_only: bool = False) -> DenoiseCheckpoint | None:
        """The newest checkpoint that is whole and finite, or None; with `own_only` of this writer's."""
        for path in (self.path, self.previous):
            checkpoint = _read(path)
            if checkpoint is not None and not (own_only and checkpoint.writer not in self._writers):
                return checkpoint
        return None

    def adopt(self) -> None:
        """Let `remove` delete what is here now, too: it is what this denoise goes on from."""
        self._writers.update(writer for path in (self.path, self.previous) if (writer := _writer_of(path)))

    def remove(self) -> None:
        """Forget this denoise; a folder that cannot be written keeps its files, and another writer's stay."""
        for path in (self.path, self.previous):
            with suppress(OSError):
                writer = _writer_of(path)
                if writer is None or writer in self._writers:  # nobody can go on from what cannot be read
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


def _flatten(owner: str, state: State, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Move the state's tensors into `tensors`, leaving their names in place."""

    def visit(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value.detach().cpu().clone().contiguous()
            return {"tensor": name}
        if isinstance(value, list):
            return [visit(f"{name}.{i}", item) for i, item in enumerate(value)]
        return value

    return {name: visit(f"{owner}.{name}", value) for name, value in state.items()}


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
            # Copies: Windows neither removes nor replaces a file that is still mapped.
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
        return None  # RuntimeError: another process has moved the file while it was opened


def _writer_of(path: Path) -> str | None:
    """Who wrote a checkpoint; None for a damaged file, "" for one that another process has just moved."""
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
