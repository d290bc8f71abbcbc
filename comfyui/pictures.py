"""Converts between videos, ComfyUI's IMAGE `[F, H, W, 3]` float32 in 0..1, and uint8 frames."""

import io
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def images_of(frames: NDArray[np.uint8]) -> Tensor:
    """Return frames `[F, H, W, 3]` uint8 as IMAGE."""
    return torch.from_numpy(frames).float().div_(255)


def frames_of(images: Tensor) -> NDArray[np.float32]:
    """Return IMAGE, whose alpha is dropped, as frames `[F, H, W, 3]` float32 in 0..1."""
    return np.ascontiguousarray(images[..., :3].detach().float().clamp(0, 1).cpu().numpy())


def decode_file(content: bytes) -> Tensor:
    """Return the frames of a video file as IMAGE."""
    with av.open(io.BytesIO(content)) as container:
        frames: list[Any] = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return images_of(np.stack(frames))
