"""Names for output files: made from a prompt, and reserved when they are chosen, so that no two programs use one.

A name is reserved by a locked file beside it, `x.mp4.taken`. The system releases the lock however the process ends. On
a file system without locks, the file's existence and the process id in it replace the lock.
"""

import hashlib
import os
import re
import tempfile
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Self

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from wanduet.errors import OutputError
from wanduet.folders import make_folder
from wanduet.media.files import NAME_LIMIT, RESERVED, check_place, output_error

TAKEN_SUFFIX = ".taken"
SLUG_BYTES = 64
WAIT_SECONDS = 0.5  # for a name that the user gave, as another program may be about to release it


class Taken:
    """Reserved names, which only this process may write. A context manager that releases them on exit."""

    def __init__(self, locks: Iterable[BaseFileLock] = ()) -> None:
        self._locks = list(locks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def add(self, other: "Taken") -> None:
        """Take over the names of `other`."""
        self._locks += other._locks
        other._locks = []

    def release(self) -> None:
        """Release the names. Does nothing the second time."""
        while self._locks:
            _release(self._locks.pop())


def take(paths: Iterable[Path], wait_seconds: float = 0.0) -> Taken | None:
    """Reserve the names of all `paths`, or return None if another program has reserved one. Creates their folders.

    Raises OutputError for names that cannot be written.
    """
    locks: list[BaseFileLock] = []
    for path in paths:
        check_place(path)
        try:
            make_folder(path.absolute().parent)
            lock = _lock(_mark(path), wait_seconds)
        except OSError as error:
            Taken(locks).release()
            raise output_error(path, error) from error
        if lock is None:
            Taken(locks).release()
            return None
        locks.append(lock)
    return Taken(locks)


def take_given(paths: Iterable[Path]) -> Taken:
    """Reserve names that the user gave; existing files will be replaced. Raises OutputError, also if another program is
    writing one of them: the first one goes on, later ones stop before they do any work."""
    paths = tuple(paths)
    taken = take(paths, WAIT_SECONDS)
    if taken is None:
        raise OutputError(
            f"Cannot write {paths[0]}: another run of wanduet is writing it now.",
            hint="Wait until that run has ended, or choose another name with --output.",
        )
    return taken


def is_taken(path: Path) -> bool:
    """Whether a program has reserved the name of `path`, or has ended without releasing it."""
    return os.path.lexists(_mark(path))


def names_for(folder: Path, prompt: str, extension: str = ".mp4") -> Iterator[Path]:
    """`folder/a-red-circle.mp4`, `folder/a-red-circle-2.mp4`, ...: an infinite iterator, also of existing files."""
    slug = slugify(prompt)
    for number in count(1):
        yield folder / (f"{slug}{extension}" if number == 1 else f"{slug}-{number}{extension}")


def slugify(text: str) -> str:
    """A file name from a prompt: letters and digits of any script, joined by `-`; `video` if there are none."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())
    cut = "-".join(words).encode("utf-8", "ignore")[:SLUG_BYTES].decode("utf-8", "ignore")
    if len(words) > 1 and len(cut.encode()) > SLUG_BYTES - 4 and "-" in cut:
        cut = cut.rpartition("-")[0]  # do not end within a word
    slug = cut.strip("-")
    return f"{slug}-video" if RESERVED.fullmatch(slug) else slug or "video"


def _mark(path: Path) -> Path:
    """The file that reserves a name; its own name is legal wherever `path` is."""
    name = os.fsencode(path.name + TAKEN_SUFFIX)
    if len(name) <= NAME_LIMIT:
        return path.with_name(path.name + TAKEN_SUFFIX)
    digest = hashlib.sha256(name).hexdigest()[:32]
    return path.with_name(f"{digest}{TAKEN_SUFFIX}")


def _lock(mark: Path, wait_seconds: float) -> BaseFileLock | None:
    """Lock a mark; None if another program has locked it, or left one that this user must not touch.

    Raises OSError if the file cannot be created. Some folders refuse that with "no such file", which the lock takes for
    another program's mark.
    """
    for kind in (FileLock, SoftFileLock):  # the second for file systems without locks
        lock = kind(mark, timeout=wait_seconds, thread_local=False)
        try:
            with warnings.catch_warnings(action="ignore"):
                lock.acquire(poll_interval=0.05)
        except Timeout:
            if not os.path.lexists(mark):  # not locked by another program, or no longer
                tempfile.TemporaryFile(dir=mark.absolute().parent).close()
            return None
        except PermissionError:
            if os.path.lexists(mark):
                return None
            raise
        except OSError:
            if kind is SoftFileLock:
                raise
            continue
        return lock
    return None


def _release(lock: BaseFileLock) -> None:
    """Delete the mark and release the lock, in the order in which no second owner is possible in between."""
    with suppress(OSError):
        if isinstance(lock, FileLock) and os.name == "posix":
            os.unlink(lock.lock_file)
    with suppress(OSError):
        lock.release()
    with suppress(OSError):
        if os.name != "posix":  # Windows deletes no open file, neither this process's nor another's
            os.unlink(lock.lock_file)
