"""Durable creation of folders and replacement of files. A protected folder that was moved away is never recreated."""

import errno
import json
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

_NEVER_MADE: set[Path] = set()
# Virus scanners and indexers of Windows keep a new file open for a moment.
REPLACE_ATTEMPTS, REPLACE_WAIT_SECONDS = 10, 0.1


def never_make(folder: Path) -> None:
    """Protect a folder: if it is moved away or removed, `make_folder` of this process does not recreate it.

    A new folder there would be in the way when the old one comes back, and files written to it would be lost.
    """
    _NEVER_MADE.add(folder.absolute())


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Create a folder and its parents, synced to disk. An existing folder keeps its mode.

    Raises OSError, also if the folder is, or is below, a protected one that is missing (`never_make`).
    """
    folder = folder.absolute()
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    if gone := [path for path in missing if path in _NEVER_MADE]:
        raise FileNotFoundError(errno.ENOENT, f"{gone[0]} was moved or removed while it was in use")
    for path in reversed(missing):  # one by one: a parent may be removed meanwhile
        path.mkdir(mode if path == folder else 0o777, exist_ok=True)
        sync_folder(path.parent)
    if not missing and not folder.is_dir():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))


def replace_file(source: Path, target: Path) -> None:
    """Rename `source` to `target`, which it replaces. Raises OSError.

    On Windows, this fails while another program has either file open, so it is retried for up to a second.
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


def replace_json(path: Path, content: object) -> None:
    """Write a value as JSON to a file, which it replaces at once; makes the folder. Raises OSError."""
    make_folder(path.parent)
    partial = tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False)  # noqa: SIM115
    try:
        with partial:
            json.dump(content, partial, indent=1)
        replace_file(Path(partial.name), path)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial.name)
        raise


def is_unlocked(path: Path | str) -> bool:
    """Return whether a file exists that no process has locked. False if that cannot be determined.

    It makes neither the file nor its folder. (filelock makes both: a folder that is moved away just then could not come
    back. Windows moves no folder in which files are open.)
    """
    if sys.platform == "win32":
        from filelock import FileLock, Timeout

        if not os.path.exists(path):
            return False
        with suppress(Timeout, OSError), FileLock(path, timeout=0, thread_local=False):
            return True
        return False
    import fcntl

    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)  # which unlocks
    return True


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk. Does nothing if the system does not support it (Windows)."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
