"""What libraries say in the service's processes, as JSON lines too: never a plain traceback, never a client's words.

A client can make a server log as often as it likes, so that the same line comes at a limited rate.
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
_WARNINGS = "py.warnings"  # whose own words are in the one argument
_MAX_TEXT = 200  # characters
_FRAMES = 5


def configure_library_logs() -> None:
    """Send the records of all loggers and all warnings of this process to structlog.

    Called by the entry points of processes only, after `configure_logs`.
    """
    root = logging.getLogger()
    plain = (logging.StreamHandler, _ToLines)  # the command line's, which writes for people
    root.handlers[:] = [*(handler for handler in root.handlers if type(handler) not in plain), _ToLines()]
    logging.captureWarnings(True)


class RateLimit:
    """Lets the same thing through once in `seconds`, and counts what it kept back."""

    def __init__(self, seconds: float = RATE_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._last: dict[Hashable, float] = {}
        self._kept_back: dict[Hashable, int] = {}

    def admit(self, key: Hashable) -> int | None:
        """None if `key` came a moment ago; else how often it was kept back since it was let through last."""
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
        """Pass on the record's own words, without the values in them, which may be a client's."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, asyncio.CancelledError):  # a request that the server itself ended
            return
        text = _words(record)
        # By its own words, where numbers were put into them: clients choose those, and hardly two would be the same.
        kept_back = self._rate.admit((record.name, str(record.msg) if _only_numbers(record) else text))
        if kept_back is not None:
            _log(record.levelno, text, error, logger=record.name, kept_back=kept_back)


def _only_numbers(record: logging.LogRecord) -> bool:
    values = record.args
    return isinstance(values, tuple) and bool(values) and all(isinstance(value, int | float) for value in values)


def _words(record: logging.LogRecord) -> str:
    text = record.getMessage() if record.name == _WARNINGS or _only_numbers(record) else str(record.msg)
    text = (text.strip().splitlines() or [""])[0][:_MAX_TEXT]
    return text.partition("(")[0] if record.name == "asyncio" else text  # then come a call's arguments


def _log(level: int, text: str, error: BaseException | None, **values: object) -> None:
    if error is not None:
        frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
        values["error"] = type(error).__name__
        values["where"] = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    structlog.get_logger().log(level, text, **{name: value for name, value in values.items() if value != 0})
