"""The host of the text encoder: the prompt encoder of the current plan, and its memory on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from wanduet.kernels.device import on_device_of
from wanduet.planning.plan import TextPlan
from wanduet.runtime.checkpoint import ModelCheckpoint
from wanduet.runtime.leases import GROUP, DeviceLeases
from wanduet.runtime.text_host import CachedPromptEncoder, PromptEncoder, RandomPromptEncoder


class PromptHost:
    """Owns the text encoder. On a GPU it runs while no other stage uses that GPU, in a CUDA stream of its own: a load of
    the transformer may go on meanwhile, and measures attention in the default stream."""

    def __init__(self, checkpoint: ModelCheckpoint, locks: DeviceLeases) -> None:
        self._checkpoint, self._locks = checkpoint, locks
        self._current: tuple[TextPlan, PromptEncoder] | None = None
        self._streams: dict[str, torch.cuda.Stream] = {}

    def encoder(self, plan: TextPlan) -> PromptEncoder:
        """Return the prompt encoder of a plan, cached until the plan changes. One thread at a time may call this, and use
        the result."""
        current = self._current
        if current is None or current[0] != plan:
            if current is not None and current[0].on_gpu:
                with self._use(current[0].device):
                    self._release()
            self._current = current = plan, self._make(plan)
        return current[1]

    def _make(self, plan: TextPlan) -> PromptEncoder:
        checkpoint, config = self._checkpoint, self._checkpoint.config
        if checkpoint.folder is None:
            return RandomPromptEncoder(checkpoint.spec)
        cache = config.data_folder / "embeddings" if config.cache_embeddings else None
        use = partial(self._use, plan.device)
        return CachedPromptEncoder(checkpoint.folder, plan.dtype, plan.residency, cache, plan.device, use)

    @contextmanager
    def _use(self, name: str) -> Iterator[None]:
        device = torch.device(name)
        with self._locks.take(GROUP), self._locks.take(name), on_device_of(device):
            self._checkpoint.limit_memory(device)
            if device.type != "cuda":
                yield
                return
            if name not in self._streams:
                self._streams[name] = torch.cuda.Stream(device)
            with torch.cuda.stream(self._streams[name]):
                yield

    def make_room(self, device: str, plan: TextPlan) -> None:
        """Free the text encoder's memory on a device, unless `plan` keeps it there. This thread must have the device's
        lock, or that of the group whose rank it is."""
        current = self._current
        if current is not None and current[0].device == device != "cpu" and current[0] != plan:
            self._release()

    def _release(self) -> None:
        if self._current is not None and isinstance(self._current[1], CachedPromptEncoder):
            self._current[1].release()

    def unload(self) -> None:
        """Drop the text encoder. No thread may use it meanwhile."""
        self._release()
        self._current = None
