"""Whether a video's file ends before it should: the containers say how long their parts are."""

import os
from typing import BinaryIO

# Parts of an MP4 that stand at its top; what else stands there may be no part of it.
_BOXES = frozenset((b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"mfra", b"sidx", b"free", b"skip", b"uuid"))
_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067
_MOST_BOXES = 10_000  # a stranger's file may hold millions of empty ones


def promised_bytes(file: BinaryIO) -> int:
    """How many bytes an MP4, Matroska or WebM file has at least, by its own words; 0 if it says nothing. Raises OSError."""
    file.seek(0)
    start = file.read(12)
    file.seek(0)
    if int.from_bytes(start[:4], "big") == _EBML:
        return _end_of_segment(file)
    return _end_of_boxes(file) if start[4:8] in _BOXES else 0


def _end_of_boxes(file: BinaryIO) -> int:
    """Where the last of an MP4's boxes ends: each begins with its size and kind."""
    size, place = file.seek(0, os.SEEK_END), 0
    for _ in range(_MOST_BOXES):
        if place >= size:
            break
        file.seek(place)
        head = file.read(16)
        length, kind, header = int.from_bytes(head[:4], "big"), head[4:8], 8
        if len(head) < header:
            return place + header if any(head) else place
        if length == 1:
            length, header = int.from_bytes(head[8:16], "big"), 16
        if kind not in _BOXES or length < header:  # to the end of the file, or no box at all
            return place
        place += length
    return place


def _end_of_segment(file: BinaryIO) -> int:
    """Where a Matroska file's only segment ends; it follows the header."""
    for wanted in (_EBML, _SEGMENT):
        name, length = _number(file, keep_marker=True), _number(file)
        if name != wanted or length is None:  # of unknown length: it was not finished, or streamed
            return 0
        end = file.tell() + length
        if wanted == _EBML:
            file.seek(end)
    return end


def _number(file: BinaryIO, *, keep_marker: bool = False) -> int | None:
    """A number of EBML's: the zeros before its first one say how many bytes follow. None if all are ones, or at the end."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    value = int.from_bytes(first + file.read(more), "big")
    bits = 7 * (more + 1)
    if keep_marker:
        return value
    value &= (1 << bits) - 1
    return None if value == (1 << bits) - 1 else value
