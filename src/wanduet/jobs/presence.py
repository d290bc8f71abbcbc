"""Checks that the data folder and the database file are still those that were opened.

A removed file still exists for processes that have it open: without this check they would accept and serve jobs that
are lost at the next start.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from wanduet.jobs.records import StoreGoneError

Identity = tuple[int, int]  # device and inode number of a file


class Presence:
    """Remembers device and inode of paths. Keeps folders open, so that their inode numbers are not reused."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Raises StoreGoneError if a path does not exist."""
        self._handles: list[int] = []
        self._known: dict[Path, Identity | None] = {}
        for path in paths:
            if path.is_dir():
                with suppress(OSError):  # Windows cannot open folders, nor remove one that contains an open file
                    self._handles.append(os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)))
            self._known[path] = None
            self._known[path] = self._identity(path)

    def check(self) -> None:
        """Compare all paths with what they were. Raises StoreGoneError."""
        for path, known in self._known.items():
            if self._identity(path) != known:
                raise StoreGoneError(
                    f"{path} is not what it was when wanduet opened it: it was removed, replaced or mounted anew.",
                    hint="Put it back, or start wanduet again to work with what is there now.",
                )

    def close(self) -> None:
        """Close the folders."""
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
        return (about.st_dev, about.st_ino) if about.st_ino else None  # some Windows file systems have no inode numbers
