"""Logs of the service's processes on standard error: one JSON object a line; on a terminal, lines for people.

Prompts are never logged, nor are the local variables of tracebacks, which may contain them.
"""

import logging
import re
import sys
import threading
import traceback
from collections.abc import MutableMapping
from contextlib import suppress
from datetime import datetime
from typing import Any, TextIO, cast

import structlog

from wanduet.untrusted import printable


def configure_logs() -> None:
    """Set up structlog for this process; for entry points. A later call replaces all that an earlier one set up."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _for_people if sys.stderr.isatty() else structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", _Patient(sys.stderr))),
        cache_logger_on_first_use=False,  # a cached logger would stay with what was set up when it first wrote
    )
    engine = logging.getLogger("wanduet")  # the engine logs with the standard library
    engine.handlers[:] = [_ToStructlog()]
    engine.setLevel(logging.INFO)
    engine.propagate = False
    threading.excepthook = _log_dead_thread


def _for_people(_: object, __: str, event: MutableMapping[str, Any]) -> str:
    """Return a line such as `12:03:04 warning: the worker hangs (job=video_1)`, in local time."""
    moment = datetime.fromisoformat(event.pop("timestamp")).astimezone()
    level, text = event.pop("level"), event.pop("event")
    about = ", ".join(f"{name}={value}" for name, value in event.items())
    line = f"{moment:%H:%M:%S} {level}: {text}" + (f" ({about})" if about else "")
    return printable(" ".join(line.split()))


class _Patient:
    """A stream that drops lines while it cannot be written, for example on a full disk, instead of raising."""

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
        """Log a record through structlog, with the locations of its exception's traceback."""
        error = record.exc_info[1] if record.exc_info else None
        about = {} if error is None else describe_error(error)
        structlog.get_logger().log(record.levelno, record.getMessage(), logger=record.name, **about)


def _log_dead_thread(about: threading.ExceptHookArgs) -> None:
    """Log a thread's uncaught exception as JSON instead of a plain traceback."""
    if about.exc_value is not None and about.exc_type is not SystemExit:
        name = about.thread.name if about.thread is not None else None
        structlog.get_logger().error("a thread died", thread=name, **describe_error(about.exc_value))


_PLACE = re.compile(r'^\s*File "(.+)", line (\d+), in (.+)$', re.MULTILINE)


def describe_error(error: BaseException) -> dict[str, Any]:
    """Return the loggable parts of an unexpected error: its type, and the locations of its and its causes' tracebacks.

    Messages and variables are left out, as they may contain a prompt. A rank process's report counts as a cause.
    """
    where: list[str] = []
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        if one is not error:
            where.append(f"caused by {type(one).__name__}")
        where += [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(one.__traceback__)]
        places = _PLACE.findall(str(getattr(one, "details", "")))
        where += [f"{file}:{line} {name}" for file, line, name in places]
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return {"error": type(error).__name__, "where": where}
