"""Folders, made so that they are on the disk, and never in the place of one that was moved away; names of files in them."""

import errno
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

_NEVER_MADE: set[Path] = set()
# Windows' virus scanners and indexers hold a new file open for a moment.
REPLACE_ATTEMPTS, REPLACE_WAIT_SECONDS = 10, 0.1


def never_make(folder: Path) -> None:
    """From now on this process makes nothing in the place of a folder that was moved away or removed.

    What stood there would be in its way when it comes back, and what is written there would be lost.
    """
    _NEVER_MADE.add(folder.absolute())


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Create a folder and those above it, on the disk when this returns. One that is there keeps its mode.

    Raises OSError, also below a folder that was there and is gone (`never_make`).
    """
    folder = folder.absolute()
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    if gone := [path for path in missing if path in _NEVER_MADE]:
        raise FileNotFoundError(errno.ENOENT, f"{gone[0]} was moved or removed while it was in use")
    for path in reversed(missing):  # one by one: what is above may go meanwhile
        path.mkdir(mode if path == folder else 0o777, exist_ok=True)
        sync_folder(path.parent)
    if not missing and not folder.is_dir():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))


def replace_file(source: Path, target: Path) -> None:
    """Give a file the name of another one, which goes. Raises OSError.

    Windows refuses while either of them is open in another program, so there it is tried for a while.
    """
    attempts = REPLACE_ATTEMPTS if sys.platform == "win32" else 1
    for left in reversed(range(attempts)):
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if not left:
                raise
            time.sleep(REPLACE_WAIT_SECONDS)


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk; where the system cannot (Windows), there is nothing to do."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
