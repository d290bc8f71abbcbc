"""stderr as messages need it: what nobody takes is left out, and never ends the work that it tells about."""

import io
import sys
from contextlib import suppress
from typing import Any, cast


class _Messages(io.RawIOBase):
    """A raw stream that takes every write, also where its file takes none: a full disk, a pipe whose reader has gone."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file

    def writable(self) -> bool:
        """Always."""
        return True

    def isatty(self) -> bool:
        """Whether somebody reads along."""
        return self._file.isatty()

    def fileno(self) -> int:
        """The file's descriptor."""
        return self._file.fileno()

    def write(self, data: Any, /) -> int:
        """The number of bytes that need no second try: all of them where the file takes none."""
        with suppress(OSError):
            return self._file.write(data) or len(memoryview(data))
        return len(memoryview(data))


def never_fail_on_stderr() -> None:
    """Make `sys.stderr`, where it is this process's own, a stream whose writes cannot fail."""
    stream = sys.stderr
    if stream is not sys.__stderr__ or not isinstance(stream, io.TextIOWrapper):
        return
    raw = getattr(stream.buffer, "raw", stream.buffer)  # PYTHONUNBUFFERED leaves no buffer in between
    buffer = io.BufferedWriter(_Messages(cast(io.RawIOBase, raw)))
    sys.stderr = io.TextIOWrapper(buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=True)
