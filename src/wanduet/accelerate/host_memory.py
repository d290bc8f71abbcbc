"""Host memory for offloaded blocks of weights: page-locked, memory-mapped, or plain."""

import logging
import os
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from wanduet.folders import make_folder

log = logging.getLogger(__name__)

MemoryKind = Literal["pinned", "mapped", "plain"]
"""pinned: page-locked; copies run beside the computation at full speed. mapped: a scratch file, which the system may
write back to disk if memory is short. plain: ordinary memory, if the device is a CPU."""

SCRATCH_PREFIX = "wanduet-block-"
PORTABLE = 1  # cudaHostRegisterPortable: page-locked for all devices, not only for the current one


class HostMemory:
    """Allocates flat buffers in host memory.

    Page-locked buffers are unlocked when this object is freed: keep a reference while they are used. `copies`: retained
    copies of blocks that are on the device, by block index; see `retain_copies`.
    """

    def __init__(self, kind: MemoryKind, folder: Path | None = None) -> None:
        """`folder`: for the scratch files of "mapped" (default: the system's temporary folder).

        Unused scratch files of earlier processes are removed from it.
        """
        self.kind, self.folder = kind, folder
        self.retains_copies = False
        self.copies: dict[int, Tensor] = {}
        self._locked: list[Tensor] = []
        weakref.finalize(self, _unlock, self._locked)
        if folder is not None:
            _remove_unused(folder)

    def retain_copies(self, enabled: bool) -> None:
        """Set whether the host copy of a block is retained when the block moves to the device.

        Weights do not change, so moving the block back then copies nothing. Disabling frees the copies.
        """
        self.retains_copies = enabled
        if not enabled:
            for copy in self.copies.values():
                self.release(copy)
            self.copies.clear()

    def allocate(self, size: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor `[size]`. Raises OSError if a scratch file cannot be made."""
        if self.kind == "mapped":
            return self._map(size, dtype)
        flat = torch.empty(size, dtype=dtype)
        if self.kind == "pinned" and torch.cuda.is_available():
            self._lock(flat)
        return flat

    def release(self, flat: Tensor) -> None:
        """Unlock a buffer of `allocate` that is no longer read; its memory is freed with its last reference."""
        for index, locked in enumerate(self._locked):
            if locked is flat or locked.data_ptr() == flat.data_ptr():
                _unlock([self._locked.pop(index)])
                return

    def close(self) -> None:
        """Unlock all buffers, drop the retained copies, and remove scratch files. No transfer may be in progress."""
        self.copies.clear()
        _unlock(self._locked)
        if self.kind == "mapped":
            _remove_unused(self._scratch_folder())

    def _lock(self, flat: Tensor) -> None:
        """Page-lock a buffer in place: PyTorch's pinned allocator would round its size up to a power of two."""
        cudart = torch.cuda.cudart()
        error = cudart.cudaHostRegister(flat.data_ptr(), flat.nbytes, PORTABLE)
        if int(error) == 0:
            self._locked.append(flat)
        else:
            log.warning("Host memory cannot be page-locked (CUDA error %s): block copies will be slower.", int(error))

    def _map(self, size: int, dtype: torch.dtype) -> Tensor:
        """Map a scratch file.

        It is unlinked at once, so that it disappears with its last mapping, even if the process is killed. Windows
        refuses that while it is mapped; there it is removed later.
        """
        folder = self._scratch_folder()
        make_folder(folder)
        _remove_unused(folder)
        handle, name = tempfile.mkstemp(prefix=SCRATCH_PREFIX, dir=folder)
        os.close(handle)  # Windows does not open a file that is to be deleted on close
        try:
            return torch.from_file(name, shared=True, size=size, dtype=dtype)
        finally:
            with suppress(OSError):
                os.unlink(name)

    def _scratch_folder(self) -> Path:
        return self.folder or Path(tempfile.gettempdir())


def _remove_unused(folder: Path) -> None:
    """Remove scratch files that no process maps: a mapped one has no name, or Windows refuses to remove it.

    A file that another process has just created is created again when it is mapped.
    """
    for path in folder.glob(f"{SCRATCH_PREFIX}*"):
        with suppress(OSError):
            os.unlink(path)


def _unlock(locked: list[Tensor]) -> None:
    """Unlock buffers before their memory is freed: `locked` still refers to them."""
    for flat in locked:
        torch.cuda.cudart().cudaHostUnregister(flat.data_ptr())
    locked.clear()
