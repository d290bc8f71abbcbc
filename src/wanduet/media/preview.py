"""Small pictures of a finished video: its middle frame, and a grid of evenly spaced frames."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from wanduet.media.codecs import Frame
from wanduet.media.read import probe, read_frames

ImageFormat = Literal["png", "webp", "jpeg"]


def encode_image(picture: Frame, image_format: ImageFormat = "webp", quality: int = 85) -> bytes:
    """Encode an RGB picture `[H, W, 3]`. PNG is lossless and ignores `quality`."""
    buffer = io.BytesIO()
    options = {} if image_format == "png" else {"quality": quality}
    Image.fromarray(picture).save(buffer, image_format.upper(), **options)
    return buffer.getvalue()


def resize(picture: Frame, longest_side: int) -> Frame:
    """Scale a picture down until its longer side is at most `longest_side`; smaller ones are not enlarged."""
    height, width = picture.shape[:2]
    scale = min(1.0, longest_side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def contact_sheet(pictures: Sequence[Frame], columns: int, gap: int = 0) -> Frame:
    """Arrange pictures of one size in rows of `columns`; gaps and missing ones are black."""
    if not pictures:
        raise ValueError("A sheet needs at least one picture.")
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    columns = min(columns, len(pictures))
    sheet = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def sample_frames(path: Path | str, count: int, longest_side: int) -> list[Frame]:
    """`count` frames of a video, evenly spaced from the first to the last, each scaled down when it is read."""
    total = int(probe(path)["num_frames"])
    wanted = spaced(total, count)
    return [resize(frame, longest_side) for index, frame in enumerate(read_frames(path)) if index in wanted]


def spaced(total: int, count: int) -> tuple[int, ...]:
    """At most `count` indices below `total`, evenly spaced; the middle one for a `count` of 1."""
    if count <= 1 or total <= 1:
        return (total // 2,)
    return tuple(dict.fromkeys(round(i * (total - 1) / (count - 1)) for i in range(count)))


def thumbnail(path: Path | str, longest_side: int = 512, image_format: ImageFormat = "webp") -> bytes:
    """The middle frame of a video as an image file."""
    return encode_image(sample_frames(path, 1, longest_side)[0], image_format)


def spritesheet(
    path: Path | str, count: int = 16, columns: int = 4, longest_side: int = 256, image_format: ImageFormat = "jpeg"
) -> bytes:
    """Evenly spaced frames of a video in a grid, as an image file."""
    return encode_image(contact_sheet(sample_frames(path, count, longest_side), columns), image_format)
