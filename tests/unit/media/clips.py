"""Video files for tests, written with PyAV."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

H, W = 64, 96


def encode(path: Path, pictures: Any, codec: str = "libx264rgb", pixel_format: str = "rgb24", **how: Any) -> Path:
    """Write pictures `[H, W, 3 or 4]` at `times` (in ticks of `time_base`; default: one tick per frame at `rate`).

    `tags`: (matrix, range) into which the pictures are converted and which the stream states. `codec_options`,
    `container_options`; `sar`: of a pixel; `turned`: degrees, counter-clockwise, and whether mirrored.
    """
    rate = Fraction(how.get("rate", 16))
    base = how.get("time_base", 1 / rate)
    with av.open(str(path), "w", options=how.get("container_options", {})) as output:
        stream = output.add_stream(codec, rate=rate, options=how.get("codec_options", {}))
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.codec_context.time_base = pixel_format, base
        if "sar" in how:
            stream.codec_context.sample_aspect_ratio = how["sar"]
        if "turned" in how:
            stream.set_display_rotation(how["turned"][0], hflip=how["turned"][1])
        matrix, levels = how.get("tags", (2, 0))
        if "tags" in how:
            stream.codec_context.colorspace, stream.codec_context.color_range = matrix, levels
        if "transfer" in how:
            stream.codec_context.color_primaries, stream.codec_context.color_trc = 9, how["transfer"]
        stream.metadata.update(how.get("metadata", {}))
        for time, picture in zip(how.get("times", range(len(pictures))), pictures, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, "rgba" if picture.shape[2] == 4 else "rgb24")
            if frame.format.name != pixel_format:
                # bt601 and limited range unless said
                frame = frame.reformat(
                    format=pixel_format, dst_colorspace=matrix if matrix != 2 else 5, dst_color_range=levels or 1,
                    interpolation="BICUBIC",
                )  # fmt: skip
            if "tags" in how:
                frame.colorspace, frame.color_range = matrix, levels
            frame.pts, frame.time_base = time, base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def greys(n: int, height: int = H, width: int = W) -> list[np.ndarray]:
    """Frames that show their number: grey of level 16 n + 16."""
    return [np.full((height, width, 3), 16 * i + 16, np.uint8) for i in range(n)]
