"""Colours against BT.709 written out here, never through the code under test."""

import itertools

import av
import numpy as np
import pytest

from wanduet.media.codecs import CODECS, ToRGB, ToVideoFrame
from wanduet.media.read import read_frames
from wanduet.media.video import VideoSpec, write_video

SOLID = [tuple(c) for c in itertools.product((0, 128, 255), repeat=3)] + [(200, 60, 20), (13, 77, 201), (250, 240, 10)]
KR, KG, KB = 0.2126, 0.7152, 0.0722  # ITU-R BT.709-6, 3.2


def bt709(rgb: np.ndarray, kr: float = KR, kg: float = KG, kb: float = KB) -> np.ndarray:
    """RGB levels `[..., 3]` to 8-bit limited-range Y'CbCr, not rounded."""
    r, g, b = np.moveaxis(np.asarray(rgb, float) / 255, -1, 0)
    y = kr * r + kg * g + kb * b
    return np.stack([16 + 219 * y, 128 + 112 * (b - y) / (1 - kb), 128 + 112 * (r - y) / (1 - kr)], -1)


def stored(path) -> np.ndarray:
    """Mean Y', Cb, Cr of each frame as they stand in the file: PyAV converts nothing here."""
    means = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            planes = frame.to_ndarray()
            h = frame.height
            means.append([planes[:h].mean(), planes[h : h + h // 4].mean(), planes[h + h // 4 :].mean()])
    return np.array(means)


def solid_frames() -> np.ndarray:
    return np.array(SOLID, np.uint8)[:, None, None, :].repeat(64, 1).repeat(64, 2)


@pytest.mark.parametrize(("codec", "name"), [("h264", "a.mp4"), ("av1", "a.mp4"), ("vp9", "a.webm")])
def test_solid_colours_are_stored_as_bt709(tmp_path, codec, name) -> None:
    path = write_video(solid_frames(), tmp_path / name, VideoSpec(64, 64, codec=codec, quality=100)).path
    got, expected = stored(path), bt709(np.array(SOLID))
    assert np.abs(got - expected).mean() < 0.5
    assert np.abs(got - expected).max() < 2.0
    bt601 = bt709(np.array(SOLID), 0.299, 0.587, 0.114)
    assert np.abs(got - bt601).max() > 15


@pytest.mark.parametrize(("codec", "name"), [("h264", "a.mp4"), ("av1", "a.mp4"), ("vp9", "a.webm")])
def test_solid_colours_come_back(tmp_path, codec, name) -> None:
    frames = solid_frames()
    path = write_video(frames, tmp_path / name, VideoSpec(64, 64, codec=codec, quality=100)).path
    got = np.stack(list(read_frames(path))).astype(int)
    assert got.shape == frames.shape
    assert np.abs(got - frames).mean() < 1.0
    assert np.abs(got - frames).max() <= 3


@pytest.mark.parametrize("quality", [None, 100])
def test_gradient_comes_back(tmp_path, quality) -> None:
    ramp = np.linspace(0, 255, 256).round()
    picture = np.zeros((64, 256, 3))
    picture[..., 0], picture[..., 1], picture[..., 2] = ramp, 255 - np.abs(2 * ramp - 255), ramp[::-1]
    frames = picture.astype(np.uint8)[None].repeat(5, 0)
    got = np.stack(list(read_frames(write_video(frames, tmp_path / "a.mp4", VideoSpec(64, 256, quality=quality)).path)))
    assert np.abs(got.astype(int) - frames).mean() < 2.0


def test_grey_ramp_has_exact_luma_and_no_colour() -> None:
    levels = np.arange(256, dtype=np.uint8)
    picture = np.ascontiguousarray(levels[None, :, None].repeat(64, 0).repeat(3, 2))
    planes = ToVideoFrame(64, 256, CODECS["h264"])(picture).to_ndarray()
    expected = 16 + levels * (219 / 255)
    assert np.abs(planes[32] - expected).max() <= 0.51
    assert (planes[64:] == 128).all()


@pytest.mark.parametrize(("axis", "shift"), [(1, 0.0), (0, 0.5)])
def test_colour_sits_at_the_left_edge_of_its_block(axis, shift) -> None:
    """H.264's default site: on the even columns, between the rows. Half a pixel off would be 0.22 levels."""
    ramp = np.arange(256)
    picture = np.zeros((256, 256, 3), np.uint8)
    picture[..., 2] = ramp[None, :] if axis == 1 else ramp[:, None]
    planes = ToVideoFrame(256, 256, CODECS["h264"])(picture).to_ndarray()
    cb = np.moveaxis(planes[256:320].reshape(128, 128), axis, 0)[8:-8, 64]
    sites = 2 * np.arange(128)[8:-8] + shift
    expected = bt709(np.stack([0 * sites, 0 * sites, sites], -1))[:, 1]
    assert abs((cb - expected).mean()) < 0.05


def test_tags_stand_in_the_stream_and_in_the_frames(tmp_path, moving) -> None:
    path = write_video(moving(), tmp_path / "a.mp4").path
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)
        frame = next(container.decode(stream))
        assert (frame.color_primaries, frame.color_trc, frame.colorspace, frame.color_range) == (1, 1, 1, 1)
    assert b"nclx\x00\x01\x00\x01\x00\x01\x00" in path.read_bytes()  # the colr box: what browsers look at


def test_reader_obeys_the_tags() -> None:
    """The same planes, tagged as BT.601 and as full range, are other colours."""
    planes = np.full((96, 64), 128, np.uint8)
    planes[:64], planes[80:] = 120, 180
    seen = set()
    for matrix, levels in ((1, 1), (6, 1), (1, 2)):
        frame = av.VideoFrame.from_ndarray(planes, "yuv420p")
        frame.colorspace, frame.color_range = matrix, levels
        seen.add(tuple(int(v) for v in ToRGB(frame)(frame)[32, 32]))
    assert len(seen) == 3


def test_untagged_video_is_taken_as_players_take_it() -> None:
    """BT.601 below 720 rows: Y' 81, Cb 90, Cr 240 is pure red there."""
    planes = np.full((96, 64), 81, np.uint8)
    planes[64:80], planes[80:] = 90, 240
    frame = av.VideoFrame.from_ndarray(planes, "yuv420p")
    assert np.abs(ToRGB(frame)(frame)[32, 32].astype(int) - (255, 0, 0)).max() <= 2
