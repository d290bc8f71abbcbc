"""Parse the fields of a JSON or form body: UTF-8 only, each name once (except a form's `loras`), truncated bodies refused.

A form's files are not kept in memory: their bytes are given to a `FilePart` as they arrive.
"""

import json
from collections.abc import Iterable
from typing import Any, Protocol
from urllib.parse import parse_qsl

from fastapi import Request
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from wanduet.doors.http.errors import ApiError, too_long
from wanduet.doors.http.lora_fields import gathered

MAX_FIELDS = 64
MAX_PART_BYTES = 2**20
MULTIPART, URLENCODED = "multipart/form-data", "application/x-www-form-urlencoded"


class FilePart(Protocol):
    """Receives a file of a form."""

    async def write(self, data: bytes) -> None:
        """Take the next bytes. May raise ApiError."""

    async def seek(self, offset: int) -> None:
        """Called once, with 0, after the last byte. May raise ApiError."""


class FileParts(Protocol):
    """Decides which files of a form are taken."""

    max_text_bytes: int  # of the form's text fields together

    def begin(self, name: str, filename: str) -> FilePart:
        """Called in the event loop when a file begins. Raises ApiError to refuse it."""


async def read_fields(request: Request, files: FileParts | None = None) -> dict[str, Any]:
    """Return the fields of a request's body; text fields of a form stay strings.

    The value of a file is what `files.begin` returned for it; without `files`, none is taken. Raises ApiError (400, 413,
    415), InvalidRequestError for LoRA whose fields cannot be matched, and what `files` raises.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == MULTIPART:
            return await _read_multipart(request, files)
        if kind == URLENCODED:
            return _read_urlencoded(await request.body())
        if kind in ("application/json", ""):
            return _read_json(await request.body())
    except ClientDisconnect:
        raise _refused("The body ended too early.") from None
    raise ApiError(415, "unsupported_media_type", "Send multipart/form-data or application/json.", param="Content-Type")


def _read_json(body: bytes) -> dict[str, Any]:
    try:
        # Decode here: `json.loads` on bytes would also accept UTF-16 and lone surrogates.
        fields = json.loads(body.decode("utf-8-sig"), object_pairs_hook=_once, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise _refused("The body is not valid JSON in UTF-8.") from None
    if not isinstance(fields, dict):
        raise _refused("The body must be a JSON object.")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _read_urlencoded(body: bytes) -> dict[str, Any]:
    try:
        pairs = parse_qsl(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS)
    except UnicodeDecodeError:
        raise _refused("The form is not valid UTF-8.") from None
    except ValueError:
        raise _refused(f"The form has more than {MAX_FIELDS} fields.") from None
    return _once(gathered(pairs))


class _Form(MultiPartParser):
    """Starlette's form parser, but strict: it refuses truncated forms, long texts and bytes that are not UTF-8."""

    ended = False
    files: FileParts | None = None
    _text_bytes = 0

    def on_headers_finished(self) -> None:
        """Let `files` take a file, in place of the parser's temporary file."""
        super().on_headers_finished()
        part = self._current_part
        if part.file is None:
            return
        name = _utf8(part.field_name)
        if self.files is None:
            raise no_file(name)
        part.file.file.close()
        filename = (part.file.filename or "").encode("latin-1").decode(errors="replace")
        part.file = self.files.begin(name, filename)  # type: ignore[assignment]  # only these methods

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        """Limit the length of all texts together."""
        if self._current_part.file is None and self.files is not None:
            self._text_bytes += end - start
            if self._text_bytes > self.files.max_text_bytes:
                raise too_long(f"A form's text fields may have {self.files.max_text_bytes} bytes at most.")
        super().on_part_data(data, start, end)

    def on_end(self) -> None:
        """Record that the parser has read the closing boundary."""
        self.ended = True


async def _read_multipart(request: Request, files: FileParts | None) -> dict[str, Any]:
    # Latin-1 maps every byte to one character, so that the bytes can be decoded strictly as UTF-8 afterwards.
    kept = Headers({"content-type": f"{request.headers['content-type']}; charset=latin-1"})
    parser = _Form(kept, request.stream(), max_fields=MAX_FIELDS, max_part_size=MAX_PART_BYTES)
    parser.files = files
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError) as error:
        reason = error.message if isinstance(error, MultiPartException) else "it is not valid."
        raise _refused(f"The form cannot be read: {reason}") from None
    if not parser.ended:
        raise _refused("The form ended too early.")
    pairs = ((_utf8(name), _utf8(value) if isinstance(value, str) else value) for name, value in form.multi_items())
    return _once(gathered(pairs))


def no_file(name: str) -> ApiError:
    """Return the error for a file under a name that takes none."""
    return ApiError(400, "unsupported", f"{name} takes no file.", param=name)


def _utf8(text: str) -> str:
    try:
        return text.encode("latin-1").decode()
    except UnicodeError:
        raise _refused("The form is not valid UTF-8.") from None


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ApiError(400, "invalid_request", f"{name} is given twice.", param=name)
        fields[name] = value
    return fields


def _refused(message: str) -> ApiError:
    return ApiError(400, "invalid_request", message)
