"""The model checkpoint of an engine: its configuration, weights folder, tensor shapes and verification."""

from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from wanduet.config import EngineConfig
from wanduet.family.registry import RANDOM_SPECS
from wanduet.family.spec import ModelSpec
from wanduet.footprint.phases import ModelMemory
from wanduet.kernels.device import MEMORY_LIMITS, prepare_allocator
from wanduet.kernels.verdicts import read_verdicts, write_verdicts
from wanduet.meta.init import meta_init
from wanduet.models.dit.model import WanTransformer
from wanduet.models.vae.model import WanVAE
from wanduet.runtime.context import Event, RunContext
from wanduet.weights.diffusers import ModelFolder
from wanduet.weights.hub import open_model, verify_manifest

MIB = 2**20


class ModelCheckpoint:
    """The checkpoint that an engine's configuration names. Properties read configs and file headers, lazily; no
    tensors."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        read_verdicts(self.measurements)

    @property
    def measurements(self) -> Path:
        """The folder for measurements of this machine."""
        return self.config.data_folder / "measurements"

    @cached_property
    def folder(self) -> ModelFolder | None:
        """The folder of the weights; None for random weights. Raises ModelNotFoundError."""
        if self.config.model in RANDOM_SPECS:
            return None
        config = self.config
        return open_model(config.model, config.revision, remember=self._verified, files=config.files)

    @cached_property
    def spec(self) -> ModelSpec:
        """The model's shapes and defaults."""
        return RANDOM_SPECS[self.config.model] if self.folder is None else self.folder.spec

    @cached_property
    def memory(self) -> ModelMemory:
        """The tensor shapes that the planner predicts memory from, checked against the headers of the weights files.

        Raises WeightsError, before a job has done any work, if the files do not match their configs.
        """
        with meta_init():
            modules: tuple[nn.Module, ...] = (WanTransformer(self.spec.transformer), WanVAE(self.spec.vae))
        shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in modules]
        if self.folder is not None:
            self.folder.transformer.check(shapes[0])
            self.folder.vae.check(shapes[1])
        return ModelMemory(self.spec, shapes[0], shapes[1], self.config.weights)

    @property
    def about(self) -> dict[str, str | None]:
        """The model's name, hash of the weights and revision, for provenance."""
        folder = self.folder
        if folder is None:
            return {"name": self.config.model, "hash": None, "revision": None}
        return {"name": folder.name, "hash": folder.fingerprint, "revision": folder.revision}

    def verify(self, context: RunContext | None = None) -> None:
        """Hash the weights that were not hashed on this machine before. With a context, emit progress.

        Raises WeightsError, or CancelledError if the job is cancelled meanwhile.
        """
        if self.folder is None:
            return
        if context is None:
            verify_manifest(self.folder, self._verified)
            return

        def show(done: int, total: int) -> None:
            context.check_cancelled()
            context.emit(Event("verify", done // MIB, total // MIB))

        with context.timed("verify_s"):
            verify_manifest(self.folder, self._verified, (), show)

    def keep_verdicts(self) -> None:
        """Store which kernels work on this machine, for later plans and processes."""
        if torch.cuda.is_available():
            write_verdicts(self.measurements)

    def limit_memory(self, device: torch.device) -> None:
        """Set `--vram-limit` in the device's allocator. Allocations beyond it raise torch.OutOfMemoryError, which
        starts the out-of-memory fallback."""
        prepare_allocator(device)
        if device.type == "cuda":
            MEMORY_LIMITS.register(device, self, self.config.vram_limit)

    def close(self) -> None:
        """Restore the allocators' limits."""
        MEMORY_LIMITS.unregister(self)

    @property
    def _verified(self) -> Path:
        return self.config.data_folder / "verified.json"
