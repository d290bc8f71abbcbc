"""Detects truncated video files by the sizes that containers state for their parts."""

import os
from typing import BinaryIO

# Top-level boxes of an MP4; anything else there may not belong to it.
_BOXES = frozenset((b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"mfra", b"sidx", b"free", b"skip", b"uuid"))
_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067
_MOST_BOXES = 10_000  # a hostile file may contain millions of empty ones


def promised_bytes(file: BinaryIO) -> int:
    """The least size of an MP4, Matroska or WebM file by its own header; 0 if not stated. Raises OSError."""
    file.seek(0)
    start = file.read(12)
    file.seek(0)
    if int.from_bytes(start[:4], "big") == _EBML:
        return _end_of_segment(file)
    return _end_of_boxes(file) if start[4:8] in _BOXES else 0


def _end_of_boxes(file: BinaryIO) -> int:
    """The end of an MP4's last box. Each box begins with its size and type."""
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
        if kind not in _BOXES or length < header:  # a box to the end of the file, or not a box
            return place
        place += length
    return place


def _end_of_segment(file: BinaryIO) -> int:
    """The end of a Matroska file's segment, which follows the header."""
    for wanted in (_EBML, _SEGMENT):
        name, length = _number(file, keep_marker=True), _number(file)
        if name != wanted or length is None:  # unknown length: not finished, or streamed
            return 0
        end = file.tell() + length
        if wanted == _EBML:
            file.seek(end)
    return end


def _number(file: BinaryIO, *, keep_marker: bool = False) -> int | None:
    """An EBML number: its leading zero bits count the bytes that follow. None if all bits are ones, or at the end."""
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
