"""Host memory that blocks of weights wait in: page-locked, memory-mapped, or plain."""

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

Hold = Literal["pinned", "mapped", "plain"]
"""pinned: copies run beside the computation at full speed. mapped: in a scratch file, which the system may
write out when memory is short. plain: ordinary memory, for a CPU as the device."""


SCRATCH_PREFIX = "wanduet-block-"
PORTABLE = 1  # cudaHostRegisterPortable: locked for every device, not the current one alone


class HostMemory:
    """Flat buffers in host memory. Page-locked ones are unlocked when this object goes: who uses them holds it too.

    `copies` are of blocks that are on the device now, by their index; see `retain_copies`.
    """

    def __init__(self, hold: Hold, folder: Path | None = None) -> None:
        """`folder` holds the scratch files of "mapped" (default: the system's temporary folder). Those that nobody
        uses any more are removed from it."""
        self.hold, self.folder = hold, folder
        self.retains_copies = False
        self.copies: dict[int, Tensor] = {}
        self._locked: list[Tensor] = []
        weakref.finalize(self, _unlock, self._locked)
        if folder is not None:
            _remove_unused(folder)

    def retain_copies(self, keeps: bool) -> None:
        """Whether a block that goes to the device leaves its copy here. Weights do not change, so when it has to make
        room there, again and again, nothing is copied back."""
        self.retains_copies = keeps
        if not keeps:
            for copy in self.copies.values():
                self.release(copy)
            self.copies.clear()

    def allocate(self, size: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised `[size]` tensor."""
        if self.hold == "mapped":
            return self._map(size, dtype)
        flat = torch.empty(size, dtype=dtype)
        if self.hold == "pinned" and torch.cuda.is_available():
            self._lock(flat)
        return flat

    def release(self, flat: Tensor) -> None:
        """A buffer of `allocate` that is not read any more; its memory goes with its last reference."""
        for index, locked in enumerate(self._locked):
            if locked is flat or locked.data_ptr() == flat.data_ptr():
                _unlock([self._locked.pop(index)])
                return

    def close(self) -> None:
        """Unlock what is locked, drop the copies, and remove scratch files; nothing may be on its way from or to here
        any more."""
        self.copies.clear()
        _unlock(self._locked)
        if self.hold == "mapped":
            _remove_unused(self._scratch_folder())

    def _lock(self, flat: Tensor) -> None:
        """Page-lock in place: torch's own pinned allocator would round each buffer up to a power of two."""
        cudart = torch.cuda.cudart()
        error = cudart.cudaHostRegister(flat.data_ptr(), flat.nbytes, PORTABLE)
        if int(error) == 0:
            self._locked.append(flat)
        else:
            log.warning("Host memory cannot be page-locked (CUDA error %s): block copies will be slower.", int(error))

    def _map(self, size: int, dtype: torch.dtype) -> Tensor:
        """In a scratch file. It loses its name at once, so that it is gone with the last mapping, whatever happens to
        the process; Windows refuses that while it is mapped, and there it is removed later."""
        folder = self._scratch_folder()
        make_folder(folder)
        _remove_unused(folder)
        handle, name = tempfile.mkstemp(prefix=SCRATCH_PREFIX, dir=folder)
        os.close(handle)  # Windows does not let a file be opened that is to be removed when it is closed
        try:
            return torch.from_file(name, shared=True, size=size, dtype=dtype)
        finally:
            with suppress(OSError):
                os.unlink(name)

    def _scratch_folder(self) -> Path:
        return self.folder or Path(tempfile.gettempdir())


def _remove_unused(folder: Path) -> None:
    """Remove scratch files that nobody maps: while one is mapped it has no name, or Windows refuses. One that another
    process has only just made is made anew when it is mapped."""
    for path in folder.glob(f"{SCRATCH_PREFIX}*"):
        with suppress(OSError):
            os.unlink(path)


def _unlock(locked: list[Tensor]) -> None:
    """Unlock while the tensors are still held here, so before their memory is freed."""
    for flat in locked:
        torch.cuda.cudart().cudaHostUnregister(flat.data_ptr())
    locked.clear()
