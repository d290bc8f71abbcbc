"""The path or folder that `--output` names."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cyclopts import Token


@dataclass(frozen=True, slots=True)
class Place:
    """A file's path, or a folder for a name derived from the prompt.

    `path` is absolute: results go there even if the current folder is moved or removed while the command works.
    """

    path: Path
    is_folder: bool
    given: Path  # as the user wrote it

    def shown(self, path: Path) -> str:
        """Return a path relative to this place as the user wrote it; absolute if it now lies outside of it."""
        given = self.given if self.is_folder else self.given.parent
        try:
            return str(given / path.relative_to(given.absolute()))
        except (OSError, ValueError):  # the current folder is gone, or the path is outside
            return str(path)


def parse_place(text: str) -> Place:
    """Parse `--output`: `videos/` is a folder, whether or not it exists, and so is an empty text.

    `~` is expanded, also if no shell has done so. Raises ValueError; OSError if the current folder is gone.
    """
    try:
        given = Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return Place(given.absolute(), os.path.basename(text) in ("", ".", "..") or _is_folder(given), given)


def place(kind: Any, tokens: Sequence[Token]) -> Place:
    """Convert a flag's text to a Place. Raises ValueError."""
    return parse_place(tokens[0].value)


def _is_folder(path: Path) -> bool:
    """Return whether a path is an existing folder; False if it cannot be accessed."""
    try:
        return path.is_dir() or not path.name
    except (OSError, ValueError):
        return False
