"""Videos that end too early are found by their containers' own words."""

import io
from pathlib import Path

import numpy as np
import pytest

from wanduet.media.files import UnreadableFileError
from wanduet.media.read import frame_hashes, probe, read_metadata
from wanduet.media.truncation import promised_bytes
from wanduet.media.video import VideoSpec, write_video

KINDS = [("h264", ".mp4"), ("vp9", ".webm"), ("ffv1", ".mkv")]


@pytest.mark.parametrize(("codec", "suffix"), KINDS)
def test_a_video_that_was_cut_off_anywhere_is_named(tmp_path: Path, codec: str, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    frames = np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3), np.uint8)
    write_video(frames, path, VideoSpec(32, 32, codec=codec), {"seed": 1})
    data = path.read_bytes()
    assert promised_bytes(io.BytesIO(data)) == len(data)
    assert promised_bytes(io.BytesIO(data + b"\0\0\0")) == len(data)  # what a mail program adds
    for length in (100, len(data) // 3, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        for read in (probe, frame_hashes, read_metadata):
            with pytest.raises(UnreadableFileError, match=rf"is cut off: it has {length} bytes"):
                read(path)
    path.write_bytes(b"")
    with pytest.raises(UnreadableFileError, match="is empty"):
        probe(path)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0" * 16, b"#!/bin/sh\n", b"\0\0\0\x08free" * 20_000, b"\0\0\0\x08free\0\0\0\0mdat", b"\0\0\0\x08freehello, world",
        b"\0\0\0\x01mdat" + b"\0" * 8, b"\x1a\x45\xdf\xa3", b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\xff", b"\x1a\x45\xdf\xa3\xff\0",
    ],
)  # fmt: skip
def test_what_says_nothing_of_its_length_is_not_called_cut_off(data: bytes) -> None:
    assert promised_bytes(io.BytesIO(data)) <= len(data)


@pytest.mark.parametrize(
    "data", [b"\0\0\0\x01mdat" + b"\xff" * 8, b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\x01" + b"\x7f" * 7]
)
def test_lengths_beyond_any_file(data: bytes) -> None:
    assert promised_bytes(io.BytesIO(data)) > 2**50
