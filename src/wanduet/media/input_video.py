"""Reads the video that a request starts from: what it is, and its frames in the size and frame rate of the result."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wanduet.family.specs import ModelSpec
from wanduet.request import INPUT_HASH, GenerationRequest, ResolvedRequest, SourceVideo


def resolve(request: GenerationRequest, spec: ModelSpec) -> ResolvedRequest:
    """`GenerationRequest.resolve`, which for an input video reads its size, length and hash first.

    Raises InvalidRequestError, also for a file that is not a video.
    """
    path = request.input_video
    source = None if path is None or path.startswith(INPUT_HASH) else read_source(Path(path))
    return request.resolve(spec, source)


def read_source(path: Path) -> SourceVideo:
    """Look through a video file. Raises InvalidRequestError of the field `input_video`."""
    raise NotImplementedError


def read_frames(path: Path, size: tuple[int, int], num_frames: int, fps: float) -> Iterator[NDArray[np.uint8]]:
    """Yield the first `num_frames` frames at `fps` a second, `[t, H, W, 3]` uint8 of height and width `size`, first
    one frame, then four at a time. Raises InvalidRequestError of the field `input_video`."""
    raise NotImplementedError
