"""Logs of the service's processes: one JSON object a line on standard error.

No prompt is ever logged, and no local variable of a traceback, which might hold one.
"""

import logging
import sys
from contextlib import suppress
from typing import TextIO, cast

import structlog


def configure_logs() -> None:
    """Set up structlog for this process; called by its entry point only."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", _Patient(sys.stderr))),
        cache_logger_on_first_use=True,
    )
    engine = logging.getLogger("wanduet")  # the engine itself knows the standard library's logs only
    engine.handlers[:] = [_ToStructlog()]
    engine.setLevel(logging.INFO)
    engine.propagate = False


class _Patient:
    """A stream whose lines are lost while it cannot be written: a full disk under the log is no reason to stop."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


class _ToStructlog(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """Pass one record on."""
        structlog.get_logger().log(record.levelno, record.getMessage(), logger=record.name)
