"""Whether the data folder and the database file are still those that were opened.

A folder that is removed lives on for the processes that have its files open: they would acknowledge jobs, and serve
them, until their next start finds nothing.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from wanduet.jobs.records import StoreGoneError

Identity = tuple[int, int]  # device and number of a file


class Presence:
    """Remembers what paths lead to. Folders are kept open, so that their numbers are not given to others."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Raises StoreGoneError where a path leads nowhere."""
        self._handles: list[int] = []
        self._known: dict[Path, Identity | None] = {}
        for path in paths:
            if path.is_dir():
                with suppress(OSError):  # Windows opens no folders, and removes none in which a file is open
                    self._handles.append(os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)))
            self._known[path] = None
            self._known[path] = self._identity(path)

    def check(self) -> None:
        """Look at all paths. Raises StoreGoneError."""
        for path, known in self._known.items():
            if self._identity(path) != known:
                raise StoreGoneError(
                    f"{path} is not what it was when wanduet opened it: it was removed, replaced or mounted anew.",
                    hint="Put it back, or start wanduet again to work with what is there now.",
                )

    def close(self) -> None:
        """Let the folders go."""
        handles, self._handles = self._handles, []
        for handle in handles:
            os.close(handle)

    def _identity(self, path: Path) -> Identity | None:
        try:
            about = os.stat(path)
        except OSError as error:
            raise StoreGoneError(
                f"{path} is gone ({error.strerror}).", hint="Put it back, or start wanduet again to begin anew."
            ) from error
        return (about.st_dev, about.st_ino) if about.st_ino else None  # some Windows file systems have no numbers
