"""Names for outputs: made up from a prompt, and taken when they are chosen, so that two programs never choose one.

A name is taken by a locked file beside it, `x.mp4.taken`. The system gives the lock back when its owner ends, however
it ends; where a file system has no locks, the file itself says whose it is.
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
from types import TracebackType
from typing import Self

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from wanduet.errors import OutputError
from wanduet.folders import make_folder
from wanduet.media.files import NAME_LIMIT, RESERVED, check_place, output_error

TAKEN_SUFFIX = ".taken"
SLUG_BYTES = 64
WAIT_SECONDS = 0.5  # for a name that the user gave; another program may be about to give it back


class Taken:
    """Names that this process alone may write. A context manager: leaving it gives them back."""

    def __init__(self, locks: Iterable[BaseFileLock] = ()) -> None:
        self._locks = list(locks)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def add(self, other: "Taken") -> None:
        """Hold another's names too, from now on in its place."""
        self._locks += other._locks
        other._locks = []

    def release(self) -> None:
        """Give the names back. Does nothing the second time."""
        while self._locks:
            _release(self._locks.pop())


def take(paths: Iterable[Path], wait_seconds: float = 0.0) -> Taken | None:
    """Take the names of all `paths`, or none: None where another program has one. Makes their folder.

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
    """Take names that the user gave; what has them now is replaced in the end. Raises OutputError, also where another
    program is writing one of them: the first to come goes on, and later ones stop before they have worked."""
    paths = tuple(paths)
    taken = take(paths, WAIT_SECONDS)
    if taken is None:
        raise OutputError(
            f"Cannot write {paths[0]}: another run of wanduet is writing it now.",
            hint="Wait until that run has ended, or choose another name with --output.",
        )
    return taken


def is_taken(path: Path) -> bool:
    """Whether a program has taken the name of `path`, or has ended without giving it back."""
    return os.path.lexists(_mark(path))


def names_for(folder: Path, prompt: str, extension: str = ".mp4") -> Iterator[Path]:
    """`folder/a-red-circle.mp4`, `folder/a-red-circle-2.mp4`, ... without end, whether they exist or not."""
    slug = slugify(prompt)
    for number in count(1):
        yield folder / (f"{slug}{extension}" if number == 1 else f"{slug}-{number}{extension}")


def slugify(text: str) -> str:
    """A file name from a prompt: letters and digits of any script, joined by `-`; `video` if none is left."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())
    cut = "-".join(words).encode("utf-8", "ignore")[:SLUG_BYTES].decode("utf-8", "ignore")
    if len(words) > 1 and len(cut.encode()) > SLUG_BYTES - 4 and "-" in cut:
        cut = cut.rpartition("-")[0]  # no half word at the end
    slug = cut.strip("-")
    return f"{slug}-video" if RESERVED.fullmatch(slug) else slug or "video"


def _mark(path: Path) -> Path:
    """The file that says that a name is taken; its own name is legal wherever `path` is."""
    name = os.fsencode(path.name + TAKEN_SUFFIX)
    if len(name) <= NAME_LIMIT:
        return path.with_name(path.name + TAKEN_SUFFIX)
    digest = hashlib.sha256(name).hexdigest()[:32]
    return path.with_name(f"{digest}{TAKEN_SUFFIX}")


def _lock(mark: Path, wait_seconds: float) -> BaseFileLock | None:
    """The lock of a mark; None if another program has it, or has left one that this user may not touch.

    Raises OSError where no file can be made. To a lock, a folder that says so by "no such file" looks like another's.
    """
    for kind in (FileLock, SoftFileLock):  # the second where the file system has no locks
        lock = kind(mark, timeout=wait_seconds, thread_local=False)
        try:
            with warnings.catch_warnings(action="ignore"):
                lock.acquire(poll_interval=0.05)
        except Timeout:
            if not os.path.lexists(mark):  # nobody has it, or had it until now
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
    """Remove the mark and give back the lock, in the order that leaves no moment for a second owner."""
    with suppress(OSError):
        if isinstance(lock, FileLock) and os.name == "posix":
            os.unlink(lock.lock_file)
    with suppress(OSError):
        lock.release()
    with suppress(OSError):
        if os.name != "posix":  # Windows removes no file that is open, neither this one nor another program's
            os.unlink(lock.lock_file)
