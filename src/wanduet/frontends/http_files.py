"""A stored file as an answer: parts of it, and nothing where the client has it already."""

import re
from collections.abc import Mapping
from pathlib import Path

from fastapi.responses import FileResponse, Response
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from wanduet.frontends.http_errors import ApiError

MAX_RANGES = 8
_RANGE = re.compile(r"bytes=([\d,\s-]*)", re.ASCII)
_PART = re.compile(r"\s*(\d{0,15})-(\d{0,15})\s*", re.ASCII)


def answer_file(path: Path, asked: Headers, media_type: str, filename: str, headers: Mapping[str, str]) -> Response:
    """The file, or the parts that the header Range asks for; 304 where If-None-Match names it.

    Raises FileNotFoundError, or ApiError (416) for a range outside of the file.
    """
    status = path.stat()
    answer = _File(path, headers=dict(headers), media_type=media_type, filename=filename, stat_result=status)
    if _names(asked.get("if-none-match"), answer.headers["etag"]):
        kept = {name: answer.headers[name] for name in ("etag", "last-modified", *map(str.lower, headers))}
        return Response(status_code=304, headers=kept)
    parts = read_ranges(asked.get("range"))
    if parts and not any(_lies_within(part, status.st_size) for part in parts):
        text = f"The file has {status.st_size} bytes."
        size = {"Content-Range": f"bytes */{status.st_size}"}
        raise ApiError(416, "range_not_satisfiable", text, param="Range", headers=size)
    answer.whole = not parts
    return answer


def read_ranges(header: str | None) -> list[tuple[int | None, int | None]]:
    """The parts that a header Range asks for, as (first, last); empty where it must be ignored (RFC 9110, 14.2)."""
    match = _RANGE.fullmatch(header or "")
    parts = [_PART.fullmatch(text) for text in match[1].split(",")] if match else []
    found = [(_number(part[1]), _number(part[2])) if part else (None, None) for part in parts]
    if len(found) > MAX_RANGES or not all(map(_means_something, found)):
        return []
    return found


class _File(FileResponse):
    """Starlette's own, which answers 400 to a Range that is to be ignored."""

    whole = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.whole:
            scope = {**scope, "headers": [item for item in scope["headers"] if item[0].lower() != b"range"]}
        await super().__call__(scope, receive, send)


def _number(digits: str) -> int | None:
    return int(digits) if digits else None


def _means_something(part: tuple[int | None, int | None]) -> bool:
    first, last = part
    return last is not None if first is None else last is None or first <= last


def _lies_within(part: tuple[int | None, int | None], size: int) -> bool:
    first, last = part
    return first < size if first is not None else bool(last and size)


def _names(header: str | None, etag: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in (header or "").split(",")]
    return etag in tags or "*" in tags
