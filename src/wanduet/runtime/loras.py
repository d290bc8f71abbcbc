"""The LoRA files of an engine's requests: found, hashed, read once, and checked against the model."""

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock

from wanduet.errors import InvalidRequestError
from wanduet.family.distilled import FewStep
from wanduet.family.registry import with_few_step_lora
from wanduet.family.spec import ModelSpec
from wanduet.loras import BUNDLED_LORAS, SPELLING, Lora, loras_at
from wanduet.planning.loras import LorasPlan
from wanduet.planning.plan import Plan
from wanduet.request import GenerationRequest, ResolvedRequest
from wanduet.runtime.checkpoint import ModelCheckpoint
from wanduet.weights.adapters.adapter import Adapter
from wanduet.weights.adapters.reader import read_adapter

KEPT = 8  # adapters that stay in memory after their last use; more if one request names more

_State = tuple[object, ...]  # a path, and the time of the last change and the size of each of its files


class LoraFiles:
    """Reads adapters for one model and keeps the last ones. Methods may be called from any thread."""

    def __init__(self, checkpoint: ModelCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._lock = Lock()
        self._read: OrderedDict[_State, Adapter] = OrderedDict()
        self.given: Mapping[str, Adapter] = {}  # by their hashes: used in place of files

    def resolve(self, request: ResolvedRequest) -> ResolvedRequest:
        """Return the request with absolute paths (not of names in the operator's folder) and the files' hashes.

        Raises InvalidRequestError for a file that is not there, has another hash than the request says, or is not one for
        this model.
        """
        if not request.loras:
            return request
        pairs = zip(request.loras, self.read(request.loras), strict=True)
        return request.model_copy(update={"loras": tuple(self._resolved(*pair) for pair in pairs)})

    def spec_for(self, request: GenerationRequest) -> ModelSpec:
        """Return the model's spec, with the sampling of a few-step LoRA of the request as its defaults. Raises as `resolve`
        does."""
        spec = self._checkpoint.spec
        few_step = self._few_step(request.loras or ())
        return spec if few_step is None else with_few_step_lora(spec, few_step)

    def _few_step(self, loras: Sequence[Lora]) -> FewStep | None:
        pairs = zip(loras, self.read(loras), strict=True)
        return next((adapter.few_step for lora, adapter in pairs if lora.strength and adapter.few_step), None)

    def _resolved(self, lora: Lora, adapter: Adapter) -> Lora:
        name = lora.name if self._folder is not None else str(self._path(lora))
        return lora.model_copy(update={"name": name, "sha256": adapter.sha256})

    def at_step(self, request: ResolvedRequest, step: int) -> list[tuple[Adapter, float]]:
        """Return the adapters of a step, by its index in the schedule, with their strengths. Raises as `resolve` does.

        A file that is gone, or has changed, since it was read for the request does not matter while it is kept.
        """
        with self._lock:
            kept: dict[str | None, Adapter] = {adapter.sha256: adapter for adapter in self._read.values()}
        for lora in request.loras:
            if lora.sha256 not in kept:
                kept[lora.sha256] = self._adapter(lora)
        self._drop_all_but(len(request.loras))
        loras = loras_at(request.loras, step - request.first_step, request.num_denoising_steps)
        return [(kept[lora.sha256], lora.strength) for lora in loras]

    def planned(self, plan: Plan, request: ResolvedRequest) -> Plan:
        """Return a plan with the memory and time that the request's adapters add. Raises as `resolve` does."""
        if not request.loras:
            return plan
        shapes = self._checkpoint.memory.transformer_shapes
        return LorasPlan.of(request, self.read(request.loras), shapes).added_to(plan)

    def warnings(self, request: ResolvedRequest) -> list[str]:
        """Return what is said about a request's files: what was left out of them, and whose sampling is used."""
        adapters = zip(request.loras, self.read(request.loras), strict=True)
        few_step = self._few_step(request.loras)
        said = (
            []
            if few_step is None
            else [f"{few_step.name}: its sampler, steps and guidance are used where none are given."]
        )
        return said + [
            f"{lora.file_name}: {count} tensor{'s' * (count > 1)} ignored: {reason}"
            for lora, adapter in adapters
            for reason, count in adapter.ignored.items()
        ]

    def read(self, loras: Sequence[Lora]) -> list[Adapter]:
        """Return the adapters, each read at its first use, or the given one of its hash. Raises as `resolve` does."""
        adapters = [self._adapter(lora) for lora in loras]
        self._drop_all_but(len(loras))
        return adapters

    def _drop_all_but(self, used: int) -> None:
        """Forget the adapters that were not used for longest. `used`: number of those of one request."""
        with self._lock:
            while len(self._read) > max(KEPT, used):
                self._read.popitem(last=False)

    def _adapter(self, lora: Lora) -> Adapter:
        if lora.sha256 is not None and lora.sha256 in self.given:
            return self.given[lora.sha256]
        path = self._path(lora)
        try:
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            about = [file.stat() for file in files]
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise self._error(lora, f"a file that exists ({path}: {reason}); {SPELLING}") from error
        state = (str(path), *((one.st_mtime_ns, one.st_size) for one in about))
        with self._lock:
            adapter = self._read.pop(state, None)
            if adapter is None:
                memory = self._checkpoint.memory
                adapter = read_adapter(path, memory.spec.transformer, memory.transformer_shapes)
            self._read[state] = adapter
        if lora.sha256 not in (None, adapter.sha256):
            raise self._error(lora, f"the file with SHA-256 {lora.sha256}; {path} is another, or has changed")
        return adapter

    @property
    def _folder(self) -> Path | None:
        return self._checkpoint.config.lora_dir

    def _path(self, lora: Lora) -> Path:
        """Return the path that a name stands for, the only place that decides it: a file of the operator's folder, if the
        engine has one, else a bundled file or any path."""
        if self._folder is None:
            if lora.name in BUNDLED_LORAS:
                return BUNDLED_LORAS[lora.name]
            try:
                return Path(lora.name).expanduser().absolute()
            except RuntimeError as error:  # an unknown `~user`
                raise self._error(lora, f"a file that exists ({error})") from error
        if lora.name in (".", "..") or "\0" in lora.name or set(lora.name) & {"/", "\\", ":", os.sep}:
            raise self._error(lora, "the name of a file in the folder of LoRAs, without a path")
        return Path(self._folder) / lora.name

    @staticmethod
    def _error(lora: Lora, allowed: str) -> InvalidRequestError:
        return InvalidRequestError("loras", lora.name, allowed)
