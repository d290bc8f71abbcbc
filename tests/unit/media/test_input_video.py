"""Input videos: what the reader says of a file, and the frames that it gives."""

import gc
import hashlib
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.unit.media.clips import H, W, encode, greys
from wanduet.errors import InvalidRequestError
from wanduet.family.wan21 import WAN_1_3B
from wanduet.media import input_video
from wanduet.media.input_video import read_frames, read_source, resolve
from wanduet.media.read import read_frames as decoded_frames
from wanduet.media.video import VideoSpec, write_video
from wanduet.request import GenerationRequest

QUIET = {"libx265": {"x265-params": "log-level=none"}, "libsvtav1": {"preset": "8"}}
LOSSLESS = {"crf": "0", "qp": "0", "x265-params": "log-level=none:lossless=1", "preset": "ultrafast"}
PATCHES = [
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (128, 128, 128),
    (255, 255, 255),
    (0, 0, 0),
    (200, 60, 20),
    (10, 90, 200),
]


def numbers(chunks: Any) -> list[int]:
    """The numbers of `greys` shown by frames."""
    return [round((float(frame.mean()) - 16) / 16) for chunk in chunks for frame in chunk]


def patches(n: int = 2) -> list[np.ndarray]:
    """Eight solid colours, in two rows of four, each of 32 x 32 pixels."""
    picture = np.array(PATCHES, np.uint8).reshape(2, 4, 3).repeat(32, 0).repeat(32, 1)
    return [picture] * n


def middles(picture: np.ndarray) -> np.ndarray:
    """The mean of the middle of each patch, `[8, 3]`."""
    rows, columns = picture.shape[0] // 2, picture.shape[1] // 4
    parts = [
        picture[r * rows + rows // 4 : (r + 1) * rows - rows // 4, c * columns + columns // 4 : (c + 1) * columns - columns // 4]
        for r in range(2) for c in range(4)
    ]  # fmt: skip
    return np.array([part.mean((0, 1)) for part in parts])


def first_frame(path: Path, size: tuple[int, int]) -> np.ndarray:
    return next(read_frames(path, size, 1, 16))[0]


# What is read


CONTAINERS = [
    ("a.mp4", "libx264", "yuv420p"), ("a.mov", "libx265", "yuv420p10le"), ("a.webm", "libvpx-vp9", "yuv420p"),
    ("a.mkv", "libsvtav1", "yuv420p10le"), ("a.avi", "mpeg4", "yuv420p"), ("b.mov", "prores_ks", "yuv422p10le"),
    ("c.mov", "prores_ks", "yuva444p10le"), ("b.avi", "mjpeg", "yuvj420p"), ("a.ts", "libx264", "yuv420p"),
    ("a.mpg", "mpeg2video", "yuv420p"), ("b.avi", "libx264", "yuv420p"), ("b.mkv", "libx264rgb", "rgb24"),
    ("a.wmv", "msmpeg4", "yuv420p"), ("a.flv", "libx264", "yuv420p"), ("a.gif", "gif", "rgb8"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "codec", "pixel_format"), CONTAINERS)
def test_any_video_is_read(tmp_path, name, codec, pixel_format) -> None:
    rate = 20 if name.endswith((".gif",)) else 25
    path = encode(
        tmp_path / name,
        greys(12),
        codec,
        pixel_format,
        rate=rate,
        codec_options=QUIET.get(codec, {}),
    )
    source = read_source(path)
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (source.height, source.width, source.frames_at(rate)) == (H, W, 12)
    chunks = list(read_frames(path, (H, W), 12, rate))
    assert [chunk.shape for chunk in chunks] == [(1, H, W, 3), (4, H, W, 3), (4, H, W, 3), (3, H, W, 3)]
    assert numbers(chunks) == list(range(12))


def test_frames_of_an_equal_size_stay_as_they_are_decoded(tmp_path, moving) -> None:
    path = write_video(moving(5), tmp_path / "a.mp4").path
    assert (np.concatenate(list(read_frames(path, (64, 96), 5, 16))) == np.stack(list(decoded_frames(path)))).all()


# Time


def test_frames_of_a_higher_rate_are_left_out(tmp_path) -> None:
    path = encode(tmp_path / "a.mp4", greys(14), rate=30)
    shown = [int(i * 30 / 16) for i in range(7)]
    assert read_source(path).frames_at(16) == 7
    assert numbers(read_frames(path, (H, W), 7, 16)) == shown


def test_frames_of_a_lower_rate_are_repeated(tmp_path) -> None:
    path = encode(tmp_path / "a.avi", greys(6), "ffv1", "bgr0", rate=10)
    assert read_source(path).frames_at(16) == 10
    assert numbers(read_frames(path, (H, W), 10, 16)) == [int(i * 10 / 16) for i in range(10)]


@pytest.mark.parametrize("rate", [Fraction(30000, 1001), 24, 60, 16])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_an_equal_rate_gives_each_frame_once(tmp_path, rate, name) -> None:
    """Also where the file rounds times to milliseconds."""
    path = encode(
        tmp_path / name,
        greys(15),
        "ffv1" if name == "a.avi" else "libx264rgb",
        "bgr0" if name == "a.avi" else "rgb24",
        rate=rate,
    )
    assert numbers(read_frames(path, (H, W), 15, float(rate))) == list(range(15))


def test_a_variable_rate_and_a_late_start(tmp_path) -> None:
    """Milliseconds after a start at 5 s; the last frame is shown as long as the one before."""
    times = [5000, 5100, 5110, 5500, 6500, 6600]
    path = encode(tmp_path / "a.mkv", greys(6), times=times, time_base=Fraction(1, 1000))
    assert read_source(path).seconds == pytest.approx(1.6, abs=0.11)
    # at 0, 0.25, 0.5 ... 1.5 s
    assert numbers(read_frames(path, (H, W), 7, 4)) == [0, 2, 3, 3, 3, 3, 4]


def test_a_gif_s_times(tmp_path) -> None:
    path = encode(tmp_path / "a.gif", greys(4), "gif", "rgb8", rate=100, times=[0, 10, 20, 120])
    assert read_source(path).seconds == pytest.approx(1.3, abs=0.1)
    assert numbers(read_frames(path, (H, W), 5, 4)) == [0, 2, 2, 2, 2]


def test_the_length_of_a_streamed_webm_is_counted(tmp_path) -> None:
    """As a browser records it: no length in the header."""
    path = encode(tmp_path / "a.webm", greys(12), "libvpx-vp9", "yuv420p", container_options={"live": "1"})
    with av.open(str(path)) as container:
        assert container.duration is None
    assert read_source(path).frames_at(16) == 12


def test_a_length_in_the_header_is_not_believed(tmp_path) -> None:
    path = encode(tmp_path / "a.mkv", greys(12), container_options={"fflags": "+bitexact"})
    data, mark = path.read_bytes(), b"\x44\x89\x88"  # Duration, a float of 8 bytes
    place = data.index(mark) + len(mark)
    path.write_bytes(data[:place] + struct.pack(">d", 3.6e6) + data[place + 8 :])
    with av.open(str(path)) as container:
        assert container.duration == 3600 * 10**6
    assert read_source(path).frames_at(16) == 12


def test_a_video_of_one_frame(tmp_path) -> None:
    path = encode(tmp_path / "a.mp4", greys(2)[1:])
    request = resolve(GenerationRequest(prompt="x", input_video=str(path)), WAN_1_3B)
    assert request.num_frames == 1
    assert numbers(read_frames(path, (H, W), 1, 16)) == [1]


def test_a_little_too_few_frames_are_completed_and_many_are_refused(tmp_path) -> None:
    path = encode(tmp_path / "a.mp4", greys(6))
    assert numbers(read_frames(path, (H, W), 9, 16)) == [*range(6), 5, 5, 5]
    with pytest.raises(InvalidRequestError, match=r"end after 0\.3 of 5\.1 seconds"):
        list(read_frames(path, (H, W), 81, 16))


def test_no_more_is_read_than_needed(tmp_path) -> None:
    """The end of the file is damaged, which the first frames do not show."""
    path = encode(
        tmp_path / "a.mkv", [np.random.default_rng(i).integers(0, 256, (H, W, 3), np.uint8) for i in range(40)]
    )
    size = path.stat().st_size
    whole = list(read_frames(path, (H, W), 5, 16))
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size // 2))
    assert all((a == b).all() for a, b in zip(whole, read_frames(path, (H, W), 5, 16), strict=True))


@pytest.mark.parametrize(("first", "after"), [(0, 12), (0, 6), (3, 9)])
def test_what_an_edit_cuts_out_is_not_shown(tmp_path, first, after) -> None:
    """As phones trim a clip: the frames stay in the file, and an edit list names those that are shown."""
    path = encode(tmp_path / "a.mp4", greys(12), "libx264", "yuv420p", rate=25)
    data, tick = path.read_bytes(), 12800 // 25
    place = data.index(b"elst") + 12  # length in ms, and start, which B-frames delay
    start = struct.unpack(">i", data[place + 4 : place + 8])[0] + first * tick
    path.write_bytes(data[:place] + struct.pack(">Ii", (after - first) * 40, start) + data[place + 8 :])
    assert read_source(path).frames_at(25) == after - first
    assert numbers(read_frames(path, (H, W), after - first, 25)) == list(range(first, after))


def test_a_file_that_is_replaced_while_it_is_read_gives_the_frames_of_its_hash(tmp_path, monkeypatch) -> None:
    path, other = encode(tmp_path / "a.mp4", greys(9)), encode(tmp_path / "b.mp4", greys(9)[::-1])
    hashed = input_video._hash

    def replaced_after(file) -> str:
        found = hashed(file)
        other.replace(path)
        return found

    sha256 = read_source(path).sha256
    monkeypatch.setattr(input_video, "_hash", replaced_after)
    assert numbers(read_frames(path, (H, W), 9, 16, sha256)) == list(range(9))


def test_a_path_in_the_home_folder_is_read_without_a_shell(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    path = encode(tmp_path / "a.mp4", greys(5))
    assert read_source(Path("~/a.mp4")) == read_source(path)
    resolved = resolve(GenerationRequest(prompt="x", input_video="~/a.mp4"), WAN_1_3B)
    assert resolved.input_video == str(path)
    with pytest.raises(InvalidRequestError, match="no such file"):
        read_source(Path("~nobody-of-this-name/a.mp4"))


def test_frames_are_freed_as_they_are_read(tmp_path) -> None:
    """Without the collector of circles of references, which does not know how large they are."""
    path = encode(tmp_path / "a.mp4", greys(15), turned=(90, False))
    gc.collect()
    gc.disable()
    try:
        for chunk in read_frames(path, (H, W), 15, 16):
            assert len(chunk) <= 4
        assert sum(isinstance(one, av.VideoFrame) for one in gc.get_objects()) <= 4
    finally:
        gc.enable()


# Space


def quadrants(height: int = H, width: int = W) -> np.ndarray:
    """Red top left, green top right, blue bottom left, white bottom right."""
    picture = np.array([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]], np.uint8)
    return picture.repeat(height // 2, 0).repeat(width // 2, 1)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_a_turned_video_is_shown_upright(tmp_path, degrees, mirrored) -> None:
    path = encode(tmp_path / "a.mp4", [quadrants()] * 2, turned=(degrees, mirrored))
    expected = np.rot90(quadrants(), degrees // 90)
    expected = expected[:, ::-1] if mirrored else expected
    source = read_source(path)
    assert (source.height, source.width) == expected.shape[:2]
    assert (first_frame(path, expected.shape[:2]) == expected).all()


def test_pixels_that_are_not_square(tmp_path) -> None:
    path = encode(tmp_path / "a.mp4", [quadrants(64, 64)] * 2, sar=Fraction(2, 1), turned=(90, False))
    source = read_source(path)
    assert (source.height, source.width) == (128, 64)
    shown = first_frame(path, (128, 64)).astype(int)
    expected = np.rot90(quadrants(64, 128)).astype(int)
    assert np.abs(shown - expected)[:60].max() <= 2  # away from the edges between colours
    assert np.abs(shown - expected)[68:].max() <= 2


def disc(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    inside = (y - (height - 1) / 2) ** 2 + (x - (width - 1) / 2) ** 2 < (0.3 * min(height, width)) ** 2
    return (inside[..., None] * np.full(3, 255)).astype(np.uint8)


@pytest.mark.parametrize("source", [(120, 200), (200, 120), (480, 640), (48, 64)])
@pytest.mark.parametrize("size", [(96, 160), (160, 96), (128, 128)])
def test_other_sizes_are_covered_and_nothing_is_distorted(tmp_path, source, size) -> None:
    path = encode(tmp_path / "a.mp4", [np.maximum(disc(*source), 90)])
    shown = first_frame(path, size)
    assert shown.shape == (*size, 3)
    assert shown.min() > 40  # no black bars
    inside = shown[..., 1] > 172
    height, width = np.flatnonzero(inside.any(1)).size, np.flatnonzero(inside.any(0)).size
    scale = max(size[0] / source[0], size[1] / source[1])
    assert abs(height - width) <= 1
    assert abs(height - 0.6 * min(source) * scale) <= 1 + scale
    middle = np.argwhere(inside).mean(0)
    assert np.abs(middle - (np.array(size) - 1) / 2).max() < 1


def test_a_fine_pattern_becomes_grey_when_it_is_made_smaller(tmp_path) -> None:
    """A filter that takes single pixels would give black, white or waves."""
    checks = (np.indices((256, 384)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
    shown = first_frame(encode(tmp_path / "a.mp4", [checks]), (32, 48))
    assert np.abs(shown.astype(int) - 127).max() <= 6


def test_a_very_large_picture_is_made_very_small(tmp_path) -> None:
    path = encode(tmp_path / "a.mkv", patches(1)[0].repeat(32, 1).repeat(32, 0)[None], "mjpeg", "yuvj420p")
    assert (read_source(path).height, read_source(path).width) == (2048, 4096)
    assert np.abs(middles(first_frame(path, (8, 16))) - PATCHES).max() <= 6


def test_a_stream_may_change_its_size(tmp_path) -> None:
    """MPEG-TS, as of a broadcast."""
    first = encode(tmp_path / "a.ts", greys(3), "mpeg2video", "yuv420p", rate=25)
    second = encode(tmp_path / "b.ts", [quadrants(128, 192)] * 3, "mpeg2video", "yuv420p", rate=25, times=[4, 5, 6])
    path = tmp_path / "c.ts"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    shown = np.concatenate(list(read_frames(path, (H, W), 6, 25)))
    assert numbers([shown[:2]]) == [0, 1]
    assert np.abs(shown[-1].astype(int) - quadrants()).mean() < 6


# Colours


@pytest.mark.parametrize("size", [(64, 128), (48, 96), (128, 256)])
@pytest.mark.parametrize(
    ("tags", "name", "codec", "pixel_format"),
    [
        ((1, 1), "a.mp4", "libx264", "yuv420p"), ((1, 2), "a.mp4", "libx264", "yuv420p"),
        ((5, 1), "a.mp4", "libx264", "yuv420p"), ((6, 2), "a.mkv", "libx264", "yuv444p"),
        ((9, 1), "a.mkv", "libx265", "yuv420p10le"), ((1, 1), "a.webm", "libvpx-vp9", "yuv420p"),
        ((1, 1), "a.mov", "prores_ks", "yuv422p10le"), ((5, 2), "a.avi", "mjpeg", "yuvj420p"),
    ],
)  # fmt: skip
def test_colours_come_out_as_the_file_states_them(tmp_path, size, tags, name, codec, pixel_format) -> None:
    quality = {
        "libvpx-vp9": {"lossless": "1"},
        "mjpeg": {"qmin": "1", "qmax": "1"},
        "libx264": LOSSLESS,
        "libx265": LOSSLESS,
    }
    # x265 gives fewer frames than its delay undefined timestamps.
    path = encode(tmp_path / name, patches(8), codec, pixel_format, tags=tags, codec_options=quality.get(codec, {}))
    assert np.abs(middles(first_frame(path, size)) - PATCHES).max() <= 4


@pytest.mark.parametrize("codec", ["h264", "vp9", "av1"])
def test_colours_of_a_video_of_ours(tmp_path, codec) -> None:
    path = write_video(patches(5), tmp_path / "a.mkv", VideoSpec(64, 128, codec=codec, quality=100)).path
    for size in ((64, 128), (32, 64)):
        assert np.abs(middles(first_frame(path, size)) - PATCHES).max() <= 3


def test_untagged_video_has_the_colours_that_players_give_it(tmp_path) -> None:
    path = encode(tmp_path / "a.mp4", patches(), "libx264", "yuv420p", codec_options=LOSSLESS)
    assert np.abs(middles(first_frame(path, (64, 128))) - PATCHES).max() <= 4


@pytest.mark.parametrize("transfer", [16, 18])  # PQ, HLG
@pytest.mark.parametrize("matrix", [9, 10, 14, 8, 0, 3])  # also ones that FFmpeg's scaler does not know
def test_hdr_and_rare_colour_spaces_are_read(tmp_path, transfer, matrix) -> None:
    path = encode(tmp_path / "a.mkv", greys(3), "ffv1", "yuv420p10le", tags=(9, 1), transfer=transfer)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\x55\xb1\x81\x09", bytes((0x55, 0xB1, 0x81, matrix))))
    assert numbers(read_frames(path, (H, W), 3, 16)) == [0, 1, 2]
    assert numbers(read_frames(path, (H // 2, W), 3, 16)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format"),
    [("a.webm", "libvpx-vp9", "yuva420p"), ("a.mov", "prores_ks", "yuva444p10le"), ("a.mkv", "ffv1", "bgra")],
)
def test_transparent_pictures_are_on_black(tmp_path, name, codec, pixel_format) -> None:
    picture = np.full((64, 128, 4), (200, 100, 50, 255), np.uint8)
    picture[:, 32:64, 3], picture[:, 64:, 3] = 128, 0
    path = encode(tmp_path / name, [picture] * 3, codec, pixel_format)
    for size in ((64, 128), (32, 64)):
        shown = first_frame(path, size).astype(int)
        scale = size[1] // 64
        for column, colour in ((8, (200, 100, 50)), (24, (100, 50, 25)), (48, (0, 0, 0))):
            assert np.abs(shown[16, column * scale] - colour).max() <= 5


def test_a_transparent_gif_is_on_black(tmp_path) -> None:
    """Two pictures of 2 x 1 pixels: red beside a transparent one."""
    frame = b"\x21\xf9\x04\x05\x0a\x00\x01\x00" + b"\x2c" + struct.pack("<4HB", 0, 0, 2, 1, 0) + b"\x02\x02\x44\x0a\x00"
    path = tmp_path / "a.gif"
    path.write_bytes(
        b"GIF89a" + struct.pack("<2H3B", 2, 1, 0x80, 0, 0) + bytes((255, 0, 0, 255, 255, 255)) + 2 * frame + b";"
    )
    assert first_frame(path, (1, 2)).tolist() == [[[255, 0, 0], [0, 0, 0]]]
