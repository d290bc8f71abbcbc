"""Reading of untrusted files, with limits on size, depth and time, and safe quoting of their content.

A file given by name may be an endless device, a pipe without a writer, or a gigabyte of brackets. All reads of such
files go through this module, and so do quotes of their content in messages.
"""

import codecs
import json
import math
import os
import re
import stat
import struct
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

QUOTED = 200  # characters of a file's content in a message
MAX_JSON_BYTES = 64 * 2**20  # the index of a model with thousands of tensors has less than one MiB
MAX_HEADER_BYTES = 100 * 2**20  # the limit of safetensors itself
MAX_DEPTH = 64
_LOOKED_AT = 2**16  # bytes read to detect a file's type
# Patterns; a HEIC or AVIF sequence has other names in the same place.
_STARTS = {
    rb"\x89PNG\r\n": "a PNG picture", rb"\xff\xd8\xff": "a JPEG picture", rb"GIF8": "a GIF picture",
    rb"RIFF....WEBP": "a WebP picture", rb"II\*\0|MM\0\*": "a TIFF picture", rb"BM....\0\0\0\0": "a BMP picture",
    rb"....ftyp(hei[cxms]|mif[12])": "a HEIC picture", rb"....ftypavif": "an AVIF picture",
    rb"ID3|\xff[\xe3\xf2\xf3\xfa\xfb]|RIFF....WAVE|fLaC": "a sound file",
    rb"GGUF": "a GGUF file of weights", rb"PK\x03\x04": "a ZIP archive, as PyTorch's .pt and .pth are", rb"%PDF": "a PDF",
}  # fmt: skip


def cut(value: object, most: int = QUOTED) -> str:
    """Return a value as text for a message: at most `most` characters, followed by the full length if it is cut."""
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def first_line(error: object) -> str:
    """Return the first line of an error's message, or the error's type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
    """Return text with unprintable characters except newlines replaced, so that it cannot control a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def check_regular(path: Path) -> int:
    """Return the size of a regular file in bytes. Raises OSError if the file is missing or not regular: reading a pipe
    or a device may never end."""
    return _require_regular(path.stat())


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading bytes. Raises OSError, also for a pipe, a device or a folder."""
    check_regular(path)  # before opening it: opening a device may have effects
    # Non-blocking: the path may have become a pipe meanwhile, and opening it would wait for a writer.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _require_regular(os.fstat(handle))
    except BaseException:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def not_safetensors(path: Path, error: Exception) -> str:
    """Return what a file is that cannot be read as safetensors, for a message: `a video, not a safetensors file`. `error`
    is shown where its first bytes do not tell."""
    kind = None
    with suppress(OSError):
        with open_regular(path) as file:
            is_video = re.match(rb"....ftyp|\x1a\x45\xdf\xa3", file.read(12), re.DOTALL)
        kind = describe_file(path) or ("a video" if is_video else None)
    if kind is None or "safetensors" in kind:
        return f"no safetensors file, or damaged ({cut(error)})"
    return f"{kind}, not a safetensors file"


def read_file(path: Path, most: int = MAX_JSON_BYTES) -> bytes:
    """Return the bytes of a regular file. Raises OSError, also if it has more than `most` bytes."""
    with open_regular(path) as file:
        return _read(file, most)


def read_stream(path: Path, most: int = MAX_JSON_BYTES) -> bytes:
    """Return the bytes of a regular file, or of a pipe with a writer (`<(command)`). Raises OSError, also for a folder
    or more than `most` bytes, as of an endless device."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if hasattr(os, "set_blocking"):
        os.set_blocking(handle, True)
    with os.fdopen(handle, "rb") as file:
        return _read(file, most)


def parse_json(text: str | bytes, finite: bool = True) -> Any:
    """Parse JSON strictly. Raises ValueError, also for duplicate names in an object, NaN, infinity, numbers beyond the
    range of a float, and nesting deeper than `MAX_DEPTH`. `finite=False` accepts such numbers, as Python writes
    them."""
    try:
        numbers = {"parse_constant": _no_constant, "parse_float": _finite} if finite else {}
        value = json.loads(text, object_pairs_hook=_object, **numbers)  # type: ignore[arg-type]
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(value)
    return value


def read_safetensors_header(path: Path, most: int = MAX_HEADER_BYTES) -> dict[str, Any]:
    """Return the JSON header of a safetensors file without reading its tensors.

    Raises OSError, or ValueError for a file that is damaged or not in the safetensors format.
    """
    with open_regular(path) as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError("the file is too short")
        (length,) = struct.unpack("<Q", start)
        if length > most:
            raise ValueError("the header is too long")
        text = file.read(length)
    if len(text) < length:
        raise ValueError("the file is too short")
    header = parse_json(text)
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    return header


def describe_file(path: Path) -> str | None:
    """Return the type of a regular file by its first bytes, for example `a JSON file`; None if they do not identify it.

    Raises OSError.
    """
    with open_regular(path) as file:
        start = file.read(_LOOKED_AT)
    for mark, kind in _STARTS.items():
        if re.match(mark, start, re.DOTALL):
            return kind
    try:
        read_safetensors_header(path)
        return "a safetensors file"
    except ValueError:
        pass
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)  # the last character may be cut
    except ValueError:
        return None
    if not text or "\0" in text:
        return None
    return "a JSON file" if text.lstrip().startswith(("{", "[")) else "a text file"


def _require_regular(found: os.stat_result) -> int:
    if stat.S_ISDIR(found.st_mode):
        raise OSError(0, "it is a folder, not a file")
    if not stat.S_ISREG(found.st_mode):
        raise OSError(0, "it is a pipe or a device, not a file")
    return found.st_size


def _read(file: BufferedReader, most: int) -> bytes:
    data = file.read(most + 1)
    if len(data) > most:
        raise OSError(0, f"it has more than {most} bytes")
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"it has {cut(twice)!r} twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{cut(text)} is too large a number")
    return number


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        if not level:
            return
        inside = (item for one in level for item in (one.values() if isinstance(one, dict) else one))
        level = [item for item in inside if isinstance(item, dict | list)]
    if level:
        raise ValueError("it is nested too deeply")
