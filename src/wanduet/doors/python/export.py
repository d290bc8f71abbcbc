"""`from wanduet import export_to_video`: diffusers' function, with the engine's own video writer."""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
from numpy.typing import NDArray

from wanduet.media.codecs import DEFAULT_QUALITY
from wanduet.media.video import VideoSpec, write_video

USUAL = 5.0  # diffusers' default quality on its scale of 0 to 10; corresponds to the engine's default
ASIDE = 0.5  # floats this far outside of 0..1 are clipped; beyond, the scale is another: -1..1 or 0..255


def export_to_video(
    video_frames: Any,
    output_video_path: str | Path | None = None,
    fps: float = 10,
    quality: float | None = USUAL,
    bitrate: int | None = None,
    macro_block_size: int | None = 16,
) -> str:
    """Write one video's frames to a file and return its path.

    `video_frames`: an array `[F, H, W, 3]` (float in 0..1, or uint8), a tensor `[F, 3, H, W]` or `[F, H, W, 3]` of the
    same values, or a list of such frames or of PIL images. `output_video_path`: `.mp4`, or another suffix that
    `wanduet` can write; None creates a temporary file. `fps`: 1 to 120, a whole number. `quality`: 0 (smallest file) to
    10 (best). `macro_block_size` has no effect: frames keep their size, but an odd last row or column is cropped.

    Raises ValueError for frames of another shape and for `bitrate`, InvalidRequestError for `fps`, OutputError.
    """
    if bitrate is not None:
        raise ValueError("bitrate= is not taken: quality= (0 to 10) decides on the size.")
    if quality is not None and not (isinstance(quality, SupportsFloat) and 0 <= float(quality) <= 10):
        raise ValueError(f"quality={quality!r} must be 0 to 10.")
    if not isinstance(fps, SupportsFloat) or not float(fps).is_integer():
        raise ValueError(f"fps={fps!r} must be a whole number.")
    if output_video_path is not None and not Path(output_video_path).name:
        raise ValueError(f"output_video_path={str(output_video_path)!r} must name a file.")
    frames = _frames(video_frames)
    height, width = frames[0].shape[:2]
    if height < 2 or width < 2:
        raise ValueError(f"Frames of {width}x{height} are too small for a video.")
    spec = VideoSpec(height // 2 * 2, width // 2 * 2, int(fps), quality=_quality(quality))
    path = _temporary() if output_video_path is None else Path(output_video_path)
    write_video(frames, path, spec)
    return str(path if output_video_path is None else output_video_path)


def _quality(quality: float | None) -> int:
    """Map diffusers' quality to the engine's 1 to 100: 0 to 1, 5 to the default, 10 to 100."""
    if quality is None:
        return DEFAULT_QUALITY
    ends = (1, DEFAULT_QUALITY) if quality <= USUAL else (DEFAULT_QUALITY, 100)
    return round(ends[0] + (ends[1] - ends[0]) * ((quality - USUAL) / USUAL + (quality <= USUAL)))


def _frames(given: Any) -> Sequence[NDArray[np.uint8]]:
    """Return one video's frames, each `[H, W, 3]` uint8. Raises ValueError."""
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise ValueError(f"video_frames must be an array, a tensor or a list of frames, not {type(given).__name__}.")
    if hasattr(given, "detach"):  # a tensor; checked without importing torch
        given = _numpy(given)
    if isinstance(given, np.ndarray) and given.ndim == 5:
        if len(given) != 1:
            raise ValueError(f"export_to_video writes one video: give frames[0] of these {len(given)}.")
        given = given[0]
    if isinstance(given, np.ndarray) and given.ndim != 4:
        raise ValueError(f"Frames must be [F, H, W, 3], not {list(given.shape)}.")
    frames = [_frame(frame) for frame in given]
    if not frames:
        raise ValueError("There are no frames to write.")
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError("Frames must all have the same size.")
    return frames


def _frame(frame: Any) -> NDArray[np.uint8]:
    """Convert one frame of any supported type to `[H, W, 3]` uint8. Raises ValueError."""
    if hasattr(frame, "convert"):  # a PIL image
        return np.asarray(frame.convert("RGB"), dtype=np.uint8)
    if isinstance(frame, list):
        raise ValueError("export_to_video writes one video: give frames[0], not the list of all videos.")
    array = np.asarray(_numpy(frame) if hasattr(frame, "detach") else frame)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[-1] not in (1, 3):
        raise ValueError(f"A frame must be [H, W, 3] or [3, H, W], not {list(array.shape)}.")
    if array.shape[-1] == 1:
        array = array.repeat(3, axis=-1)
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"Frames must be uint8, or float in 0..1, not {array.dtype}.")
    if not np.isfinite(array).all():
        raise ValueError("Frames have NaN or infinite values.")
    if array.min(initial=0.0) < -ASIDE or array.max(initial=0.0) > 1.0 + ASIDE:
        raise ValueError(f"Frames of floats must be in 0..1, not {array.min():.3g} to {array.max():.3g}.")
    return (array.clip(0.0, 1.0) * 255.0).round().astype(np.uint8)


def _numpy(tensor: Any) -> NDArray[Any]:
    found = tensor.detach().cpu()
    return np.asarray((found.float() if found.is_floating_point() else found).numpy())


def _temporary() -> Path:
    with tempfile.NamedTemporaryFile(suffix=".mp4", delete=False) as file:
        return Path(file.name)
