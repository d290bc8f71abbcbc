"""Receives the file of a submission: the video that a request starts from.

It is written to the data folder while it arrives, within the server's limits, and deleted with the request: the job
gets a copy of its own when it is stored. It is read only in a process of its own, see `uploads`.
"""

import hashlib
import os
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import structlog
from anyio import to_thread
from fastapi import Request

from wanduet.config import format_bytes
from wanduet.doors.http.bodies import no_file
from wanduet.doors.http.context import ServerContext
from wanduet.doors.http.errors import ApiError, no_space, too_long
from wanduet.doors.http.public import NAME_LIMIT, sendable
from wanduet.doors.http.schemas import FILES
from wanduet.doors.http.uploads import SourceReader
from wanduet.errors import InvalidRequestError
from wanduet.jobs.keeper import AttemptSettings
from wanduet.request import INPUT_HASH, GenerationRequest
from wanduet.source_video import SourceVideo

log = structlog.get_logger(__name__)


class ReceivedFile:
    """A file of a form, in the data folder. `str` gives its hash, which stands for it in digests of a request."""

    def __init__(self, field: str, filename: str, path: Path, receiver: "InputFiles") -> None:
        self.field = field  # as the client names it
        self.filename = filename
        self.path = path
        self._receiver = receiver
        self._size = 0
        self._hash = hashlib.sha256()
        self._file: IO[bytes] | None = None

    @property
    def sha256(self) -> str:
        """The hash of what has arrived so far."""
        return self._hash.hexdigest()

    def __str__(self) -> str:
        return f"{INPUT_HASH}{self.sha256}"

    async def write(self, data: bytes) -> None:
        """As in `bodies.FilePart`. Raises ApiError (413, 507), and QueueFullError before the first byte is stored."""
        await self._run(self._write, data)

    async def seek(self, offset: int) -> None:
        """As in `bodies.FilePart`: the file is complete, and is on the disk afterwards. Raises ApiError."""
        if not self._size:
            raise InvalidRequestError(self.field, self.filename, "the file is empty")
        await self._run(self._finish)

    async def _run(self, work: Any, *values: Any) -> None:
        try:
            await to_thread.run_sync(work, *values, limiter=self._receiver.context.writers)
        except OSError as error:
            log.error("an upload could not be stored", error=type(error).__name__, number=error.errno)
            raise no_space() from None

    def _write(self, data: bytes) -> None:
        if self._file is None:
            self._receiver.check_room()
            self._file = open(self.path, "xb", opener=_open_private)  # noqa: SIM115  # closed by `_finish` or `discard`
        self._size += len(data)
        limit = self._receiver.context.settings.max_input_bytes
        if self._size > limit:
            raise too_long(f"{self.field}: this server takes a video of at most {format_bytes(limit)}.", self.field)
        self._hash.update(data)
        self._file.write(data)

    def _finish(self) -> None:
        assert self._file is not None
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def discard(self) -> None:
        """Delete the file."""
        with suppress(OSError):
            if self._file is not None:
                self._file.close()
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


class InputFiles:
    """What a submission has of files, at most one; a context in which it exists. As `bodies.FileParts`."""

    def __init__(self, context: ServerContext, request: Request, owner: str, key: str | None) -> None:
        """`key` is the request's idempotency key."""
        self.context = context
        self.max_text_bytes = context.settings.max_body_bytes
        self._owner, self._key = owner, key
        length = request.headers.get("content-length", "0")
        self._expected = int(length) if length.isdigit() else 0
        self._exit = ExitStack()
        self._taken: ReceivedFile | None = None

    def __enter__(self) -> "InputFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def begin(self, name: str, filename: str) -> ReceivedFile:
        """Take a file. Raises ApiError if the field takes none, or if too many files are received just now."""
        if name not in FILES:
            raise no_file(name)
        if self._taken is not None:
            raise _second(name, self._taken.field)
        self.context.check_accepting()
        self._exit.enter_context(self.context.uploads.enter(self._owner))
        self._taken = ReceivedFile(name, sendable(filename, NAME_LIMIT), self.context.store.files.new_upload(), self)
        self._exit.callback(self._taken.discard)
        return self._taken

    def check_room(self) -> None:
        """Raise QueueFullError or ApiError (507) if the job could not be stored."""
        store = self.context.store
        store.check_room(self._owner, self._key, self.context.settings.queue)
        if store.files.free_bytes() < self._expected + AttemptSettings().reserve_bytes:
            raise no_space()

    def take(self, fields: dict[str, Any]) -> ReceivedFile | None:
        """Give the file its field's own name, and return it. Raises ApiError for a text in place of a file."""
        for name in FILES & fields.keys():
            if fields[name] is not None and fields[name] is not self._taken:
                text = f"{name}: upload the file itself, as a part of multipart/form-data. Paths and addresses are not taken."
                raise ApiError(400, "invalid_request", text, param=name)
            if (value := fields.pop(name)) is not None:
                fields[FILES[name]] = value
        return self._taken

    async def resolve(self, fields: dict[str, Any]) -> GenerationRequest:
        """`ServerContext.to_request`, for which the file is read in a process of its own. Raises InvalidRequestError,
        ApiError."""
        context, file = self.context, self._taken
        if file is None:
            if fields.get("loras"):
                return await to_thread.run_sync(context.to_request, fields)
            return context.to_request(fields)
        values = {name: str(file.path) if value is file else value for name, value in fields.items()}

        def look() -> SourceVideo:
            source = SourceReader().read(file.path, file.field, file.filename)
            return replace(source, sha256=file.sha256)  # a process that reads an untrusted file is not trusted

        return await to_thread.run_sync(context.to_request, values, look, limiter=context.readers)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _second(name: str, first: str) -> ApiError:
    others = " or ".join(FILES)
    text = f"{name} is given twice." if name == first else f"Give one file: {others}, which mean the same."
    return ApiError(400, "invalid_request", text, param=name)
