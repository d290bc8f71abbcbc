"""The current device, for what launches kernels outside PyTorch's own operations; and how its memory is handed out."""

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
# Only GPUs give a program so much shared memory whose matrix units read their factors from it (wgmma: 9.0, 10.x).
WGMMA_SHARED_MEMORY = 200 * 1024


def on_device_of(x: Tensor | torch.device) -> AbstractContextManager[object]:
    """A block in which a tensor's device is the current one. Triton launches on that, whatever it is given."""
    device = x.device if isinstance(x, Tensor) else x
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program of Triton's may have."""
    if device.type != "cuda":
        return 2**30  # Triton's interpreter
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; some number for Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@lru_cache
def prepare_allocator(device: torch.device) -> None:
    """Let PyTorch's CUDA allocator grow its blocks instead of keeping one for each size it was ever asked for.

    A decode's tensors differ from layer to layer; with fixed blocks the allocator held up to 1.8 times what they
    took. To be called before the first large allocation on a device. Where somebody has set the allocator up, on
    Windows, and with a driver that cannot map memory so, nothing is changed. It holds for the whole process and stays.
    """
    chosen = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF")
    if sys.platform != "linux" or device.type != "cuda" or chosen:
        return
    _set_allocator("expandable_segments:True")
    try:
        torch.empty(ATTEMPT_BYTES, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return  # says nothing against growing blocks
    except RuntimeError as error:
        log.info("The driver cannot let the allocator's blocks grow: %s", error)
        _set_allocator("expandable_segments:False")


def _set_allocator(settings: str) -> None:
    """The accelerator's own name for it came with PyTorch 2.9."""
    setter = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (setter or torch.cuda.memory._set_allocator_settings)(settings)


class MemoryLimits:
    """How much of a device PyTorch's allocator may take: one number for the whole process, which several may want to set.

    While all who hold a device have a limit, it is the sum of them; who has none may use all there is. What the program
    had set before is put back when the last lets go.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[torch.device, MutableMapping[object, int | None]] = {}  # forgets who is gone without a word
        self._before: dict[torch.device, float] = {}

    def hold(self, device: torch.device, owner: object, limit: int | None) -> None:
        """From now on `owner` computes on a CUDA device, and takes at most so many bytes of it."""
        with self._lock:
            if not self._held.get(device):
                self._before[device] = torch.cuda.get_per_process_memory_fraction(device)
            self._held.setdefault(device, WeakKeyDictionary())[owner] = limit
            self._apply(device)

    def let_go(self, owner: object) -> None:
        """`owner` computes no more on any device."""
        with self._lock:
            for device, held in self._held.items():
                if owner in held:
                    del held[owner]
                    self._apply(device)

    def _apply(self, device: torch.device) -> None:
        limits, fraction = tuple(self._held[device].values()), self._before[device]
        known = [limit for limit in limits if limit is not None]
        if limits and len(known) == len(limits):
            fraction = min(fraction, sum(known) / torch.cuda.get_device_properties(device).total_memory)
        if torch.cuda.get_per_process_memory_fraction(device) != fraction:
            torch.cuda.set_per_process_memory_fraction(fraction, device)


MEMORY_LIMITS = MemoryLimits()
