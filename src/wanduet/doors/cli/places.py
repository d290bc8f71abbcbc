"""Where a command's results go: what `--output` says, a file's path or a folder."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cyclopts import Token


@dataclass(frozen=True, slots=True)
class Place:
    """A file's path, or a folder in which a name is made up. `path` is absolute: results go there also when the current
    folder is moved or removed while the command works."""

    path: Path
    is_folder: bool
    given: Path  # as the user wrote it

    def shown(self, path: Path) -> str:
        """A path at this place in the user's spelling; absolute where that is another place by now."""
        given = self.given if self.is_folder else self.given.parent
        try:
            return str(given / path.relative_to(given.absolute()))
        except (OSError, ValueError):  # the current folder is gone; another place
            return str(path)


def parse_place(text: str) -> Place:
    """What `--output` means: `videos/` is a folder, whether it exists or not, and so is no text at all.

    `~` is somebody's home also where no shell has replaced it. Raises ValueError, OSError without a current folder.
    """
    try:
        given = Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return Place(given.absolute(), os.path.basename(text) in ("", ".", "..") or _is_folder(given), given)


def place(kind: Any, tokens: Sequence[Token]) -> Place:
    """A flag's text as a place. Raises ValueError."""
    return parse_place(tokens[0].value)


def _is_folder(path: Path) -> bool:
    """Whether a path is a folder that is there. One that cannot be looked at is none."""
    try:
        return path.is_dir() or not path.name
    except (OSError, ValueError):
        return False
