"""Responses with stored files: ranges, and 304 if the client has the file already.

Starlette's `FileResponse` sends files and ranges. This module adds what RFC 9110 requires beyond it: an invalid Range
header is ignored, of several ranges only those within the file are sent, and HEAD ignores Range.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastapi import Request
from fastapi.responses import FileResponse, Response
from starlette.types import Message, Receive, Scope, Send

from wanduet.doors.http.errors import ApiError

MAX_RANGES = 8
_RANGE = re.compile(r"bytes=([\d,\s-]*)", re.ASCII | re.IGNORECASE)
_PART = re.compile(r"(?P<first>\d{1,15})-(?P<last>\d{0,15})|-(?P<suffix>\d{1,15})", re.ASCII)


def answer_file(path: Path, request: Request, media_type: str, filename: str, headers: Mapping[str, str]) -> Response:
    """Return the file, or the ranges that the Range header names; 304 if If-None-Match matches the file.

    Raises FileNotFoundError, or ApiError (416) for a range outside of the file.
    """
    status, sent = path.stat(), request.headers
    answer = _File(path, headers=dict(headers), media_type=media_type, filename=filename, stat_result=status)
    if _names(sent.get("if-none-match"), answer.headers["etag"]):
        kept = {name: answer.headers[name] for name in ("etag", "last-modified", *map(str.lower, headers))}
        return Response(status_code=304, headers=kept)
    current = sent.get("if-range") in (None, answer.headers["etag"], answer.headers["last-modified"])
    parts = read_ranges(sent.get("range")) if request.method == "GET" and current else []
    answer.parts = [part[0] for part in parts if _lies_within(part, status.st_size)]
    if parts and not answer.parts:
        text = f"The file has {status.st_size} bytes."
        size = {"Content-Range": f"bytes */{status.st_size}"}
        raise ApiError(416, "range_not_satisfiable", text, param="Range", headers=size)
    return answer


def read_ranges(header: str | None) -> list[re.Match[str]]:
    """Return the ranges of a Range header; an empty list if the header must be ignored (RFC 9110, 14.2)."""
    match = _RANGE.fullmatch(header or "")
    texts = [text.strip() for text in match[1].split(",")] if match else []
    parts = [_PART.fullmatch(text) for text in texts if text]  # a list may have empty elements
    found = [part for part in parts if part and not (part["last"] and int(part["last"]) < int(part["first"]))]
    return found if len(found) == len(parts) <= MAX_RANGES else []


class _File(FileResponse):
    """Starlette's FileResponse with validated ranges, and 404 for a file that is deleted before it is opened.

    A file that is deleted later is still sent completely, because the open file stays readable.
    """

    parts: Sequence[str] = ()  # in the syntax of the Range header

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wanted = [(b"range", f"bytes={','.join(self.parts)}".encode())] if self.parts else []
        headers = [item for item in scope["headers"] if item[0].lower() not in (b"range", b"if-range")]
        start: Message | None = None

        async def send_once_open(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message  # sent only after the file has been opened
                return
            if start is not None:
                begun, start = start, None
                await send(begun)
            await send(message)

        try:
            await super().__call__({**scope, "headers": headers + wanted}, receive, send_once_open)
        except FileNotFoundError:
            if start is None:
                raise
            gone = ApiError(404, "not_found", "This file was deleted just now.", param="video_id")
            await gone.response()(scope, receive, send)


def _lies_within(part: re.Match[str], size: int) -> bool:
    return int(part["first"]) < size if part["first"] else int(part["suffix"]) > 0 < size


def _names(header: str | None, etag: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in (header or "").split(",")]
    return etag in tags or "*" in tags
