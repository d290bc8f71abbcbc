"""Device properties for Triton kernels, the current device, and PyTorch's CUDA allocator."""

import logging
import os
import sys
import threading
from collections.abc import MutableMapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

log = logging.getLogger(__name__)

ATTEMPT_BYTES = 32 * 2**20
# Only GPUs whose matrix units read operands from shared memory (wgmma: 9.0, 10.x) give a program so much of it.
WGMMA_SHARED_MEMORY = 200 * 1024


def on_device_of(x: Tensor | torch.device) -> AbstractContextManager[object]:
    """Return a context in which the tensor's device is current: Triton launches on the current device, wherever its
    arguments are."""
    device = x.device if isinstance(x, Tensor) else x
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a Triton program can use."""
    if device.type != "cuda":
        return 2**30  # Triton's interpreter
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of a GPU's multiprocessors; an arbitrary number for Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@lru_cache
def prepare_allocator(device: torch.device) -> None:
    """Let PyTorch's CUDA allocator grow its segments (`expandable_segments`), for the rest of the process.

    A decode's tensors differ in size from layer to layer; with fixed segments the allocator reserved up to 1.8 times
    their bytes. Call this before the first large allocation on a device. Nothing changes if the environment configures
    the allocator, on Windows, or with a driver that cannot map memory in this way.
    """
    chosen = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF")
    if sys.platform != "linux" or device.type != "cuda" or chosen:
        return
    _set_allocator("expandable_segments:True")
    try:
        torch.empty(ATTEMPT_BYTES, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return  # does not show that growing is unsupported
    except RuntimeError as error:
        log.info("The driver cannot let the allocator's blocks grow: %s", error)
        _set_allocator("expandable_segments:False")


def _set_allocator(settings: str) -> None:
    """Apply allocator settings. PyTorch 2.9 renamed the function."""
    setter = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (setter or torch.cuda.memory._set_allocator_settings)(settings)


class MemoryLimits:
    """Limits the bytes of a device that PyTorch's allocator may take: one limit for the process, from several owners.

    While all owners of a device have a limit, the device's limit is their sum, if that is below the program's own
    limit. If an owner has none, and when the last owner leaves, the limit that the program had set before applies.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owners: dict[torch.device, MutableMapping[object, int | None]] = {}  # weak keys: drops deleted owners
        self._before: dict[torch.device, float] = {}

    def register(self, device: torch.device, owner: object, limit: int | None) -> None:
        """Register `owner` on a CUDA device, with a limit in bytes or None for no limit."""
        with self._lock:
            if not self._owners.get(device):
                self._before[device] = torch.cuda.get_per_process_memory_fraction(device)
            self._owners.setdefault(device, WeakKeyDictionary())[owner] = limit
            self._apply(device)

    def unregister(self, owner: object) -> None:
        """Remove `owner` from all devices."""
        with self._lock:
            for device, owners in self._owners.items():
                if owner in owners:
                    del owners[owner]
                    self._apply(device)

    def _apply(self, device: torch.device) -> None:
        limits, fraction = tuple(self._owners[device].values()), self._before[device]
        known = [limit for limit in limits if limit is not None]
        if limits and len(known) == len(limits):
            fraction = min(fraction, sum(known) / torch.cuda.get_device_properties(device).total_memory)
        if torch.cuda.get_per_process_memory_fraction(device) != fraction:
            torch.cuda.set_per_process_memory_fraction(fraction, device)


MEMORY_LIMITS = MemoryLimits()
