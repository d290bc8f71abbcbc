"""Writes libraries' log messages to a file in the data folder instead of the user's terminal."""

import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TextIO

from wanduet.folders import make_folder

LOG_FILE = "libraries.log"
MOST_BYTES = 2**20


def handlers(folder: Path, stream: TextIO) -> list[logging.Handler]:
    """Return handlers for a command's root logger: one for the terminal and one for the log file.

    The terminal gets wanduet's messages, and libraries' errors; the file gets all of libraries' messages.
    """
    terminal = logging.StreamHandler(stream)
    terminal.addFilter(lambda record: _is_ours(record) or record.levelno >= logging.ERROR)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    kept = _LibrariesLog(folder / LOG_FILE, maxBytes=MOST_BYTES, backupCount=1, encoding="utf-8", delay=True)
    kept.addFilter(lambda record: not _is_ours(record))
    kept.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return [terminal, kept]


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] == "wanduet"


class _LibrariesLog(RotatingFileHandler):
    """A log file that is created at the first message; if its folder cannot be written, messages are dropped."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        try:
            make_folder(Path(self.baseFilename).parent)
        except OSError:
            return
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the standard library's name
        """Ignore the error."""
