"""Reading what a stranger may have made: bounded in size, depth and time, and quoted without harm.

A file that is given by name may be a device that never ends, a pipe that nobody fills, a gigabyte of brackets. Whatever
is read goes through here, and so does what a message quotes of it.
"""

import codecs
import json
import math
import os
import stat
import struct
from io import BufferedReader
from pathlib import Path
from typing import Any

QUOTED = 200  # characters of a file's content in a message
MAX_JSON_BYTES = 64 * 2**20  # the index of a model of thousands of tensors has less than one MiB
MAX_HEADER_BYTES = 100 * 2**20  # what safetensors itself allows
MAX_DEPTH = 64
_LOOKED_AT = 2**16  # bytes of a file that say what it is
_STARTS = {
    b"\x89PNG\r\n": "a PNG picture", b"\xff\xd8\xff": "a JPEG picture", b"GIF8": "a GIF picture",
    b"RIFF....WEBP": "a WebP picture", b"II*\0": "a TIFF picture", b"MM\0*": "a TIFF picture",
    b"GGUF": "a GGUF file of weights", b"PK\3\4": "a ZIP archive, as PyTorch's .pt and .pth are", b"%PDF": "a PDF",
}  # fmt: skip


def cut(value: object, most: int = QUOTED) -> str:
    """A value as a message quotes it: at most `most` characters and a note of how many there were."""
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def printable(text: str) -> str:
    """Text from a file that anybody may have made, without what steers a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def check_regular(path: Path) -> int:
    """The size in bytes of a file. Raises OSError if it is not there, or is no plain file: reading a pipe or a device
    may never end."""
    return _require_regular(path.stat())


def open_regular(path: Path) -> BufferedReader:
    """A plain file, opened for reading bytes. Raises OSError, also for a pipe, a device or a folder."""
    check_regular(path)  # only then opened: opening a device may do something
    # Without waiting: opening a pipe, which may have come in between, would wait for a writer.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _require_regular(os.fstat(handle))
    except BaseException:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def read_file(path: Path, most: int = MAX_JSON_BYTES) -> bytes:
    """The bytes of a plain file. Raises OSError, also for a file of more than `most` bytes."""
    with open_regular(path) as file:
        return _read(file, most)


def read_stream(path: Path, most: int = MAX_JSON_BYTES) -> bytes:
    """The bytes of a plain file, or of a pipe that has a writer (`<(command)`). Raises OSError, also for a folder, a
    device without end, and more than `most` bytes."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if hasattr(os, "set_blocking"):
        os.set_blocking(handle, True)
    with os.fdopen(handle, "rb") as file:
        return _read(file, most)


def parse_json(text: str | bytes, finite: bool = True) -> Any:
    """JSON without what the standard allows and no program expects: a name twice in one object, NaN, infinity, numbers
    beyond a float, deeper than `MAX_DEPTH`. With `finite` False such numbers are taken, as Python writes them. Raises ValueError."""
    try:
        numbers = {"parse_constant": _no_constant, "parse_float": _finite} if finite else {}
        value = json.loads(text, object_pairs_hook=_object, **numbers)  # type: ignore[arg-type]
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(value)
    return value


def read_safetensors_header(path: Path, most: int = MAX_HEADER_BYTES) -> dict[str, Any]:
    """The JSON header of a safetensors file, without its tensors.

    Raises OSError, or ValueError for a file that is damaged or of another kind.
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
    """What a plain file is that is none of ours, by its first bytes: `a JSON file`; None where they do not say.

    Raises OSError.
    """
    with open_regular(path) as file:
        start = file.read(_LOOKED_AT)
    for mark, kind in _STARTS.items():
        if start.startswith(mark) or (start[:4] + b"...." + start[8:]).startswith(mark):
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
