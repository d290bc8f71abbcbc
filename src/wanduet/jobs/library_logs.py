"""Sends the logs of libraries in the service's processes to structlog, without tracebacks and without client data.

A client can make a server log often, so the rate of each message is limited.
"""

import asyncio
import logging
import threading
import time
import traceback
from collections.abc import Callable, Hashable
from pathlib import Path

import structlog

RATE_SECONDS = 10.0
_MAX_KEYS = 256
_WARNINGS = "py.warnings"  # its records have the warning's text as their only argument
_MAX_TEXT = 200  # characters
_FRAMES = 5


def configure_library_logs() -> None:
    """Send the records of all loggers and all warnings of this process to structlog.

    For the entry points of processes, after `configure_logs`.
    """
    root = logging.getLogger()
    plain = (logging.StreamHandler, _ToLines)  # not those of the command line, which write for people
    root.handlers[:] = [*(handler for handler in root.handlers if type(handler) not in plain), _ToLines()]
    logging.captureWarnings(True)


class RateLimit:
    """Admits each key once in `seconds`, and counts those it suppresses."""

    def __init__(self, seconds: float = RATE_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._last: dict[Hashable, float] = {}
        self._kept_back: dict[Hashable, int] = {}

    def admit(self, key: Hashable) -> int | None:
        """None if `key` is suppressed; otherwise how often it was suppressed since it was last admitted."""
        now = self._clock()
        with self._lock:
            if now - self._last.get(key, -self._seconds) < self._seconds:
                self._kept_back[key] = self._kept_back.get(key, 0) + 1
                return None
            if len(self._last) >= _MAX_KEYS:
                self._last.clear()
                self._kept_back.clear()
            self._last[key] = now
            return self._kept_back.pop(key, 0)


class _ToLines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self._rate = RateLimit()

    def emit(self, record: logging.LogRecord) -> None:
        """Log the record's format string without its arguments, which may be client data."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, asyncio.CancelledError):  # a request that the server cancelled
            return
        text = _words(record)
        # Limit by format string if there are arguments: clients choose their values, so hardly two messages are equal.
        kept_back = self._rate.admit((record.name, str(record.msg) if _only_numbers(record) else text))
        if kept_back is not None:
            _log(record.levelno, text, error, logger=record.name, kept_back=kept_back)


def _only_numbers(record: logging.LogRecord) -> bool:
    values = record.args
    return isinstance(values, tuple) and bool(values) and all(isinstance(value, int | float) for value in values)


def _words(record: logging.LogRecord) -> str:
    text = record.getMessage() if record.name == _WARNINGS or _only_numbers(record) else str(record.msg)
    text = (text.strip().splitlines() or [""])[0][:_MAX_TEXT]
    return text.partition("(")[0] if record.name == "asyncio" else text  # after the parenthesis come a call's arguments


def _log(level: int, text: str, error: BaseException | None, **values: object) -> None:
    if error is not None:
        frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
        values["error"] = type(error).__name__
        values["where"] = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    structlog.get_logger().log(level, text, **{name: value for name, value in values.items() if value != 0})
