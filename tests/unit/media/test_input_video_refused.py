"""Files that are no input videos: the error says what is wrong and what to do."""

import os
import re
from pathlib import Path

import av
import numpy as np
import pytest

from tests.unit.media.clips import H, W, encode, greys
from wanduet.errors import InvalidRequestError
from wanduet.family.wan21 import WAN_1_3B
from wanduet.media.input_video import read_frames, read_source, resolve
from wanduet.request import GenerationRequest


def refusal(path: Path | str) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        resolve(GenerationRequest(prompt="x", input_video=str(path)), WAN_1_3B)
    assert caught.value.field == "input_video"
    return caught.value


def mp4(path: Path) -> bytes:
    return encode(path, greys(3), codec_options={"preset": "ultrafast"}).read_bytes()


def png() -> bytes:
    return b"\x89PNG\r\n\x1a\n" + bytes(100)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.png", png()), ("a.jpg", b"\xff\xd8\xff\xe0" + bytes(99)), ("a.webp", b"RIFF\x10\0\0\0WEBPVP8 " + bytes(99)),
        ("a.mp4", png()), ("a.heic", b"\0\0\0\x18ftypheic" + bytes(99)), ("a.heif", b"\0\0\0\x18ftypmif1" + bytes(99)),
        ("a.bmp", b"BM\x10\0\0\0\0\0\0\0" + bytes(99)), ("a.tif", b"II*\0" + bytes(99)),
    ],
)  # fmt: skip
def test_a_picture_is_refused_with_what_it_needs(tmp_path, name, data) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    assert re.search("picture; image to video needs another model of the Wan family", refusal(path).message)


@pytest.mark.parametrize("name", ["a.gif", "a.avif"])
def test_a_still_picture_of_a_kind_that_may_move_is_refused(tmp_path, name) -> None:
    codec, pixel_format = ("gif", "rgb8") if name == "a.gif" else ("libsvtav1", "yuv420p")
    path = encode(tmp_path / name, greys(1), codec, pixel_format)
    assert "image to video needs another model" in refusal(path).message


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "it is empty"), (b"What is this?\n" * 50, "a text file"), (b"#EXTM3U\n#EXTINF:9,\n/etc/passwd\n", "a text file"),
        (b"ffconcat version 1.0\nfile a.mp4\n", "a text file"), (b'{"a": 1}', "a JSON file"), (b"%PDF-1.7 \xff\0", "a PDF"),
        (bytes(range(256)) * 64, "damaged, or not a video"), (bytes(5000), "damaged, or not a video"),
        (b"RIFF\x10\0\0\0WAVEfmt " + bytes(99), "a sound file"), (b"ID3\4" + bytes(500), "a sound file"),
        (b"GIF89a", "damaged, or not a video"), (b"\x1aE\xdf\xa3" + bytes(500), "damaged, or not a video"),
    ],
)  # fmt: skip
def test_what_is_no_video_is_refused(tmp_path, data, says) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    error = refusal(path)
    assert says in error.message
    assert error.given == "a.mp4"


def test_paths_that_name_no_file(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "there is no such file" in refusal(tmp_path / "none.mp4").message
    assert len(refusal("a" * 5000).message) < 1000
    assert "it is a folder" in refusal(tmp_path).message
    assert "it must be a file" in refusal("-").message
    assert "it must be a file" in refusal("https://example.org/a.mp4").message
    assert "it must be a file" in refusal("file:///a.mp4").message
    assert refusal("a\0b").given == "a\0b"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_without_a_writer_is_refused_at_once(tmp_path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    assert "a pipe or a device" in refusal(tmp_path / "a.mp4").message


def test_sound_without_pictures_is_refused(tmp_path) -> None:
    path = tmp_path / "a.m4a"
    with av.open(str(path), "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    assert "it has no pictures, only sound" in refusal(path).message


def test_a_truncated_or_damaged_video_is_refused(tmp_path) -> None:
    path = tmp_path / "a.mp4"
    data = mp4(path)
    path.write_bytes(data[: len(data) // 2])
    assert "it is cut off" in refusal(path).message
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    path.write_bytes(data[:start] + bytes(end - start) + data[end:])
    assert "none of its pictures can be decoded" in refusal(path).message


def test_absurd_sizes_are_refused(tmp_path) -> None:
    path = tmp_path / "a.mkv"
    data = encode(path, greys(2, 256, 256), "ffv1", "bgr0").read_bytes()
    sides = b"\xb0\x82\x01\x00\xba\x82\x01\x00"  # PixelWidth, PixelHeight
    assert sides in data
    path.write_bytes(data.replace(sides, b"\xb0\x82\x3e\x80\xba\x82\x3e\x80"))
    assert "more than 8192x8192 pixels" in refusal(path).message
    assert "crop it" in refusal(encode(tmp_path / "b.mkv", greys(2, 16, 512), "ffv1", "bgr0")).message


def test_a_file_that_changes_or_goes_is_an_error(tmp_path) -> None:
    path = tmp_path / "a.mp4"
    data = mp4(path)
    read_source(path)
    for change in (lambda: path.write_bytes(data[:-50]), lambda: path.write_bytes(b""), path.unlink):
        change()
        with pytest.raises(InvalidRequestError, match=r"cut off|empty|no such file"):
            list(read_frames(path, (H, W), 3, 16))


@pytest.mark.parametrize(
    "playlist",
    [
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.ts\n#EXT-X-ENDLIST\n#\xff\n",
        b"ffconcat version 1.0\nfile a.ts\n#\xff\n",
    ],
)
def test_no_other_file_is_opened(tmp_path, playlist) -> None:
    encode(tmp_path / "a.ts", greys(3), "libx264", "yuv420p")
    path = tmp_path / "b.m3u8"
    path.write_bytes(playlist)
    with av.open(str(path)) as container:  # FFmpeg itself opens the other file
        assert container.streams.video
    assert "not a video" in refusal(path).message


def test_an_unknown_compression_is_refused(tmp_path) -> None:
    path = encode(tmp_path / "a.mkv", greys(2), "ffv1", "bgr0")
    path.write_bytes(path.read_bytes().replace(b"V_FFV1", b"V_FF99"))
    assert "compressed by a method that cannot be read" in refusal(path).message
