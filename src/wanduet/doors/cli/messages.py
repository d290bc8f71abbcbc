"""A stderr whose writes never fail: messages that cannot be written are dropped instead of ending the work."""

import io
import sys
from contextlib import suppress
from typing import Any, cast


class _Messages(io.RawIOBase):
    """A raw stream that reports every write as done, also if its file fails: a full disk, a pipe without a reader."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file

    def writable(self) -> bool:
        """Return True."""
        return True

    def isatty(self) -> bool:
        """Return whether the file is a terminal."""
        return self._file.isatty()

    def fileno(self) -> int:
        """Return the file's descriptor."""
        return self._file.fileno()

    def write(self, data: Any, /) -> int:
        """Return the number of bytes written; if writing fails, the number of all bytes, so that none is retried."""
        with suppress(OSError):
            return self._file.write(data) or len(memoryview(data))
        return len(memoryview(data))


def never_fail_on_stderr() -> None:
    """Replace `sys.stderr`, unless it has been redirected in Python, by a stream whose writes cannot fail."""
    stream = sys.stderr
    if stream is not sys.__stderr__ or not isinstance(stream, io.TextIOWrapper):
        return
    raw = getattr(stream.buffer, "raw", stream.buffer)  # with PYTHONUNBUFFERED there is no buffer
    buffer = io.BufferedWriter(_Messages(cast(io.RawIOBase, raw)))
    sys.stderr = io.TextIOWrapper(buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=True)
