"""Atomic output files: the path is checked before the job, the file is written beside it and renamed at the end.

All files that the project writes under a final name go through `atomic_output`, not only videos.
"""

import errno
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import ClassVar, Protocol

from wanduet.config import format_bytes
from wanduet.errors import OutputError, WanduetError
from wanduet.folders import is_unlocked, make_folder, replace_file, sync_folder

if sys.platform != "win32":
    import fcntl

PARTIAL_SUFFIX = ".partial"
NAME_LIMIT = 255  # bytes of a file name on the usual file systems
STALE_SECONDS = 60.0  # a younger partial file may not be locked yet
# Windows' device names, reserved with any extension.
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)", re.IGNORECASE)
_WINDOWS_REFUSES = re.compile(r'[<>:"|?*\x00-\x1f]')
_HINT = "Choose another place with --output."

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this system allows",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EIO: "the disk reported an error",
    errno.EILSEQ: "the name is not valid",
    errno.ELOOP: "its symbolic links lead in a circle",
}


class UnreadableFileError(WanduetError):
    """An input file is missing, damaged, or was not written by wanduet."""

    code: ClassVar[str] = "unreadable_file"


class SystemRefusal(Protocol):
    """An error with errno and message: OSError, and FFmpeg's errors, some of which are not OSErrors."""

    errno: int | None
    strerror: str | None


def output_error(path: Path, error: SystemRefusal, flag: str = "--output") -> OutputError:
    """The OutputError for a failed write, with a cause that users understand. `flag` sets another place."""
    if isinstance(error, FileExistsError | NotADirectoryError):  # a parent in the path is a file
        reason = f"{_first_file(path.parent)} is a file, not a folder"
    else:
        reason = _REASONS.get(error.errno or 0) or error.strerror or str(error)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = f"Free some space, or choose another place with {flag}." if full else f"Choose another place with {flag}."
    return OutputError(f"Cannot write {path}: {reason}.", hint=hint)


def check_writable(path: Path, needed_bytes: int = 0) -> None:
    """Check before a job that `path` can be written and `needed_bytes` are free; creates its folder.

    An existing file is allowed: it is replaced when the new one is complete. Raises OutputError.
    """
    check_place(path)
    try:
        folder = path.absolute().parent
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        if free < needed_bytes:
            raise OutputError(
                f"Cannot write {path}: this needs {format_bytes(needed_bytes)}, the disk has {format_bytes(free)} free.",
                hint="Free some space, or choose another place with --output.",
            )
        make_folder(folder)
        partial, handle = _create_partial(path)
        os.close(handle)
        partial.unlink()
    except OSError as error:
        raise output_error(path, error) from error


def check_place(path: Path, windows: bool = sys.platform == "win32") -> None:
    """Check that `path` can be a file: not an illegal name, a folder, a device or a write-protected file.

    Creates nothing. Raises OutputError.
    """
    if windows and (problem := _windows_problem(path)):
        raise OutputError(f"Cannot write {path}: {problem}.", hint=_HINT)
    try:
        _refuse_special(path)
    except OSError as error:
        raise output_error(path, error) from error


@contextmanager
def atomic_output(path: Path, *, keep_finished: bool = False) -> Iterator[Path]:
    """Yield an empty partial file beside `path`; rename it to `path` on success, delete it on failure.

    The data and the folder's entry are synced to the disk when the block ends. `path` is always the old file or the
    complete new one, even if the process is killed; a partial file left by a killed process is deleted by the next one
    that writes the same path. With `keep_finished`, a finished file is kept under another name, which the error names,
    if `path` cannot be replaced: Windows refuses that while a player has it open. Raises OutputError.
    """
    check_place(path)
    try:
        make_folder(path.absolute().parent)
        _remove_stale(path)
        partial, lock = _create_partial(path)
    except OSError as error:
        raise output_error(path, error) from error
    is_kept = False
    try:
        try:
            yield partial
        finally:
            os.close(lock)  # before the rename: Windows neither renames nor deletes an open file
        try:
            _sync_file(partial)
            replace_file(partial, path)
            sync_folder(path.absolute().parent)
        except (PermissionError, IsADirectoryError) as error:
            if not keep_finished:
                raise output_error(path, error) from error
            kept = _keep_beside(partial, path)
            is_kept = kept == partial
            why = "it is a folder now" if path.is_dir() else "another program may have it open"
            raise OutputError(
                f"Cannot replace {path}: {why}. The finished file is kept as {kept}.",
                hint=f"Rename it now: the next file that is written as {path.name} removes it."
                if is_kept
                else "Rename it once the name is free.",
            ) from error
        except OSError as error:
            raise output_error(path, error) from error
    finally:
        if not is_kept:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes, *, keep_finished: bool = False) -> None:
    """Write a file through `atomic_output`. Raises OutputError."""
    with atomic_output(path, keep_finished=keep_finished) as partial:
        try:
            partial.write_bytes(data)
        except OSError as error:
            raise output_error(path, error) from error


def _refuse_special(path: Path) -> None:
    """Raise OutputError for what must not be replaced: folders, devices (`/dev/null`), write-protected files."""
    if not path.name:
        raise OutputError(
            f"Cannot write {str(path)!r}: it is a folder.", hint="Name a file in it, for example clip.mp4."
        )
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except ValueError:  # a NUL character
        raise OutputError(f"Cannot write {str(path)!r}: the name is not valid.", hint=_HINT) from None
    if stat.S_ISDIR(mode):
        raise OutputError(f"Cannot write {path}: it is a folder.", hint="Name a file in it, for example clip.mp4.")
    if not stat.S_ISREG(mode):
        raise OutputError(f"Cannot write {path}: it is a device, not a file.", hint=_HINT)
    if not os.access(path, os.W_OK):
        raise OutputError(f"Cannot write {path}: a write-protected file has that name.", hint=_HINT)


def _windows_problem(path: Path) -> str | None:
    """Why a name is not possible on Windows, where it may mean a device or a stream of another file; else None."""
    for part in path.parts:
        if part == path.anchor or part in (".", ".."):
            continue
        if character := _WINDOWS_REFUSES.search(part):
            return f"Windows does not allow {character[0]!r} in a name"
        if part != part.rstrip(". "):
            return "Windows does not allow a name that ends with a dot or a space"
        if RESERVED.fullmatch(part.partition(".")[0].rstrip()):
            return f"Windows keeps the name {part!r} for a device"
    return None


def _keep_beside(partial: Path, path: Path) -> Path:
    """Rename a finished file that cannot be renamed to `path`, for example to `clip-2.mp4` instead of `clip.mp4`.

    As a partial file it would be deleted later. If it cannot be renamed, it is copied; if that fails, too, it stays.
    """
    free = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
    kept = next(candidate for candidate in free if not os.path.lexists(candidate))
    with suppress(OSError):
        replace_file(partial, kept)
        return kept
    try:
        shutil.copyfile(partial, kept)
        _sync_file(kept)
    except OSError:
        with suppress(OSError):
            kept.unlink(missing_ok=True)
        return partial
    return kept


def _first_file(folder: Path) -> Path:
    return next((p for p in reversed((folder, *folder.parents)) if p.exists() and not p.is_dir()), folder)


def _partial_prefix(path: Path) -> str:
    """The prefix of `path`'s partial files, shortened so that their names are not too long."""
    room = NAME_LIMIT - len(f".{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    return os.fsdecode(os.fsencode(path.name)[:room]) + "."


def _create_partial(path: Path) -> tuple[Path, int]:
    """Create an empty file beside `path`; returns it and a file descriptor that has it locked."""
    partial = path.with_name(f"{_partial_prefix(path)}{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    handle = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_CLOEXEC", 0), 0o666)
    if sys.platform != "win32":
        with suppress(OSError):  # some network file systems do not support locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return partial, handle


def _remove_stale(path: Path) -> None:
    """Delete partial files of `path` whose writer is gone: old enough, and not locked."""
    prefix = _partial_prefix(path)
    with os.scandir(path.absolute().parent) as entries:
        for entry in entries:
            if entry.name.startswith(prefix) and entry.name.endswith(PARTIAL_SUFFIX):
                with suppress(OSError):
                    if time.time() - entry.stat().st_mtime > STALE_SECONDS and is_unlocked(entry.path):
                        os.unlink(entry.path)


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
