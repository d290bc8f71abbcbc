import io

import numpy as np
import pytest
from PIL import Image

from wanduet.media.preview import (
    contact_sheet,
    encode_image,
    resize,
    sample_frames,
    spaced,
    spritesheet,
    thumbnail,
)
from wanduet.media.video import write_video


def test_sheet_places_pictures_in_reading_order() -> None:
    pictures = [np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30, 40, 50)]
    sheet = contact_sheet(pictures, columns=2, gap=1)
    assert sheet.shape == (8, 7, 3)
    assert [int(sheet[y, x, 0]) for y in (0, 3, 6) for x in (0, 4)] == [10, 20, 30, 40, 50, 0]
    assert contact_sheet(pictures[:2], columns=5).shape == (2, 6, 3)
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([], 3)


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_images_open_again(kind) -> None:
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:, :24] = (200, 60, 20)
    image = Image.open(io.BytesIO(encode_image(picture, kind)))
    assert (image.format, image.size) == (kind.upper(), (48, 32))
    got = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(got[:, :20] - picture[:, :20]).mean() < (0.01 if kind == "png" else 6)


def test_resize_keeps_the_shape_and_never_enlarges() -> None:
    picture = np.zeros((480, 832, 3), np.uint8)
    assert resize(picture, 256).shape == (148, 256, 3)
    assert resize(picture, 9999) is not None
    assert resize(picture, 9999).shape == picture.shape
    assert resize(np.zeros((2, 900, 3), np.uint8), 10).shape == (1, 10, 3)


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(81, 1, (40,)), (81, 3, (0, 40, 80)), (5, 5, (0, 1, 2, 3, 4)), (3, 9, (0, 1, 2)), (1, 4, (0,))],
)
def test_spaced(total, count, expected) -> None:
    assert spaced(total, count) == expected


def test_thumbnail_and_spritesheet_of_a_video(tmp_path) -> None:
    frames = np.arange(0, 250, 10, dtype=np.uint8)[:, None, None, None].repeat(64, 1).repeat(96, 2).repeat(3, 3)
    path = write_video(frames, tmp_path / "a.mp4").path
    assert [round(float(f.mean()), -1) for f in sample_frames(path, 3, 48)] == [0, 120, 240]
    image = Image.open(io.BytesIO(thumbnail(path, 48)))
    assert (image.format, image.size) == ("WEBP", (48, 32))
    assert abs(np.asarray(image.convert("RGB")).mean() - 120) < 4
    sheet = Image.open(io.BytesIO(spritesheet(path, 16, 4, 48)))
    assert (sheet.format, sheet.size) == ("JPEG", (192, 128))
