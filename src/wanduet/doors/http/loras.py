"""The operator's folder of LoRA: what its files are, which a request may name, and their hashes.

Clients name files of the folder, never paths; a name counts only if it is in the folder's list. The folder is the
operator's, so a link in it is followed.
"""

import difflib
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from wanduet.config import format_bytes
from wanduet.doors.http.lora_fields import NO_PATH
from wanduet.doors.http.public import NAME_LIMIT, public_text, sendable
from wanduet.doors.http.schemas import RequestLimits
from wanduet.errors import InvalidRequestError, WanduetError
from wanduet.family.distilled import FewStep
from wanduet.family.registry import with_few_step_lora
from wanduet.family.spec import ModelSpec
from wanduet.loras import Lora
from wanduet.untrusted import cut
from wanduet.weights.adapters.facts import describe_adapter, few_step_of
from wanduet.weights.adapters.files import PICKLES, open_adapter
from wanduet.weights.adapters.reader import AdapterHeader, measure_adapter

ENDINGS = (".safetensors", *PICKLES)
NEAREST = 3  # names in a message

_State = tuple[tuple[int, ...], ...]


class LoraFile(BaseModel):
    """A LoRA of the operator's folder. `fits`: the served model takes it; else `problem` says why not."""

    name: str
    object: Literal["lora"] = "lora"
    bytes: int
    fits: bool
    problem: str | None = None
    kinds: list[str] = []  # lora, loha, lokr, dora, diff
    rank: tuple[int, int] | None = None  # lowest and highest
    alpha: tuple[float, float] | None = None
    targets: dict[str, int] = {}  # number of modules, by their names in a block
    blocks: int = 0  # with an update
    hidden_size: int | None = None
    made_for: list[str] = []  # known models of that size
    few_step: dict[str, Any] | None = None  # name and sampling of a known few-step LoRA, used where a request sets none
    ignored: dict[str, int] = {}  # number of tensors that are not used, by the reason
    sha256: str | None = None  # once a request has named the file as it is


class LoraList(BaseModel):
    """The LoRA of this server."""

    object: Literal["list"] = "list"
    data: list[LoraFile]


@dataclass(slots=True)
class _Known:
    """What is known of a file in the state in which it was read."""

    path: Path
    state: _State
    shown: LoraFile
    few_step: FewStep | None = None


class LoraFolder:
    """The LoRA that a server offers for its model. Methods may be called from any thread; they read headers, and a file
    whole when a request first names it."""

    def __init__(self, folder: Path | None, spec: ModelSpec, limits: RequestLimits) -> None:
        """`folder`: need not exist; None: the server has no LoRA."""
        self._folder, self._spec, self._limits = folder, spec, limits
        self._known: dict[str, _Known] = {}
        self._reading, self._hashing = threading.Lock(), threading.Lock()

    def names(self) -> list[str]:
        """Return the names of the files and PEFT folders that may be LoRA, sorted."""
        try:
            with os.scandir(self._folder or "") as entries:
                return sorted(entry.name for entry in entries if _is_candidate(entry))
        except OSError:
            return []

    def files(self) -> list[LoraFile]:
        """Return what each file of the folder is."""
        names = self.names()
        with self._reading:
            self._known = {name: known for name, known in self._known.items() if name in names}
        return [known.shown for name in names if (known := self._look(name)) is not None]

    def resolve(self, loras: Sequence[Lora]) -> tuple[list[Lora], ModelSpec]:
        """Return a request's LoRA with the hashes of their files, and the model's spec with the sampling of a few-step LoRA
        among them as its defaults.

        Raises InvalidRequestError for a name that the folder does not have, a file that does not fit the model or has
        another hash than the request has, and too many or too large ones.
        """
        if len(loras) > self._limits.loras:
            raise _refused(f"{len(loras)} LoRA", f"this server takes at most {self._limits.loras}", self._limits.loras)
        found = [self._find(lora.name) for lora in loras]
        if (size := sum(known.shown.bytes for known in found)) > self._limits.lora_bytes:
            limit = f"this server takes at most {format_bytes(self._limits.lora_bytes)} in one request"
            raise _refused(f"{len(loras)} LoRA of {format_bytes(size)}", limit)
        hashed = [self._hashed(lora, known) for lora, known in zip(loras, found, strict=True)]
        few_step = next(
            (known.few_step for lora, known in zip(loras, found, strict=True) if lora.strength and known.few_step), None
        )
        return hashed, self._spec if few_step is None else with_few_step_lora(self._spec, few_step)

    def measure(self, loras: Iterable[Lora], shapes: Mapping[str, tuple[int, ...]]) -> list[AdapterHeader]:
        """Return what each LoRA adds to a plan, from its header. `shapes`: of the transformer's parameters. Raises
        InvalidRequestError as `resolve` does, and for a file whose tensors do not fit the parameters."""
        found = {lora.name: lora for lora in loras}  # a file counts once, as it is read once
        return [self._measured(lora, shapes) for lora in found.values()]

    def kept(self, loras: Iterable[Lora]) -> tuple[list[Lora], list[str]]:
        """Return those of a made video's LoRA that this server has, with the same names and hashes, and a note for each of
        the others."""
        kept: list[Lora] = []
        notes: list[str] = []
        for lora in loras:
            name = public_text(lora.file_name, NAME_LIMIT)
            try:
                (found,), _ = self.resolve([lora.model_copy(update={"name": lora.file_name, "sha256": None})])
            except InvalidRequestError:
                notes.append(
                    f"It was made with the LoRA {name}, which this server does not have, or which does not fit here."
                )
                continue
            if found.sha256 == lora.sha256:
                kept.append(found)
            else:
                notes.append(f"It was made with another file of the LoRA {name} than this server has.")
        return kept, notes

    def _find(self, name: str) -> _Known:
        """Return a file that fits the model."""
        if name in ("", ".", "..") or set(name) & {"/", "\\", ":", "\0"}:
            raise _refused(name, NO_PATH)
        names = self.names()
        known = self._look(name) if name in names else None
        if known is None:
            if not names:
                raise _refused(name, "this server has no LoRA")
            nearest = difflib.get_close_matches(
                name.lower(), by_lower := {one.lower(): one for one in names}, NEAREST, 0.5
            )
            text = ", ".join(sendable(by_lower[one], NAME_LIMIT) for one in nearest)
            raise _refused(name, "this server has no LoRA of that name; GET /v1/loras lists them", text or None)
        if not known.shown.fits:
            raise _refused(name, f"it cannot be used here: {known.shown.problem}")
        return known

    def _look(self, name: str) -> _Known | None:
        """Return what a file is, from its header; None if it is gone."""
        path = (self._folder or Path()) / name
        try:
            state, size = _state_of(path)
        except OSError:
            return None
        with self._reading:
            known = self._known.get(name)
            if known is None or known.state != state:
                known = self._known[name] = self._read(_Known(path, state, LoraFile(name=name, bytes=size, fits=False)))
        return known

    def _read(self, known: _Known) -> _Known:
        try:
            about = describe_adapter(known.path)
            known.few_step = few_step_of(open_adapter(known.path))
        except (WanduetError, OSError, ValueError) as error:
            text = error.message if isinstance(error, WanduetError) else "it cannot be read"
            known.shown.problem = public_text(text.replace(str(known.path), "it").rstrip("."))
            return known
        problem = _misfit(about, self._spec)
        known.shown = LoraFile(
            **{name: about[name] for name in ("kinds", "rank", "alpha", "targets", "blocks", "hidden_size", "ignored")},
            name=known.shown.name,
            bytes=known.shown.bytes,
            made_for=about["fits"],
            few_step=None if known.few_step is None else {"name": known.few_step.name, **known.few_step.defaults()},
            fits=problem is None,
            problem=problem,
        )
        return known

    def _measured(self, lora: Lora, shapes: Mapping[str, tuple[int, ...]]) -> AdapterHeader:
        try:
            return measure_adapter(self._find(lora.name).path, self._spec.transformer, shapes)
        except WanduetError as error:
            if isinstance(error, InvalidRequestError):
                raise
            raise _refused(lora.name, f"it cannot be used here: {public_text(error.message)}") from None

    def _hashed(self, lora: Lora, known: _Known) -> Lora:
        if known.shown.sha256 is None:
            with self._hashing:  # who waits for another's hash has it then
                try:
                    known.shown.sha256 = known.shown.sha256 or open_adapter(known.path).sha256()
                except WanduetError as error:
                    raise _refused(lora.name, f"it cannot be read: {public_text(error.message)}") from None
        if lora.sha256 not in (None, known.shown.sha256):
            raise _refused(lora.name, f"this server's file has changed: its SHA-256 is not {lora.sha256}")
        return lora.model_copy(update={"sha256": known.shown.sha256})


def _is_candidate(entry: os.DirEntry[str]) -> bool:
    name = entry.name
    if name.startswith(".") or set(name) & {"\\", ":"} or sendable(name, len(name)) != name:
        return False
    try:
        if entry.is_file():
            return Path(name).suffix.lower() in ENDINGS
        return entry.is_dir() and open_adapter(Path(entry.path)) is not None
    except (WanduetError, OSError):
        return False


def _state_of(path: Path) -> tuple[_State, int]:
    """Return what changes when a file or a PEFT folder does, and its size in bytes. Raises OSError."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [file.stat() for file in files]
    return tuple((one.st_mtime_ns, one.st_size, one.st_ino) for one in found), sum(one.st_size for one in found)


def _misfit(about: dict[str, Any], spec: ModelSpec) -> str | None:
    """Return why a LoRA does not fit a model; None if it does."""
    hidden, dim = about["hidden_size"], spec.transformer.dim
    if hidden not in (None, dim):
        made_for = " or ".join(about["fits"]) or "another model"
        return f"it is made for {made_for}, of hidden size {hidden}; {public_text(spec.name)} has {dim}"
    if about["blocks"] > spec.transformer.num_layers:
        return f"it changes {about['blocks']} blocks; {public_text(spec.name)} has {spec.transformer.num_layers}"
    if about["unmatched"]:
        return f"{about['unmatched']} of its tensors match nothing in Wan's transformer"
    return None


def _refused(given: str, allowed: str, nearest: object | None = None) -> InvalidRequestError:
    return InvalidRequestError("loras", cut(sendable(given), NAME_LIMIT), allowed, nearest)
