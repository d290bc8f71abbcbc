"""Latents to frames for `WanPipeline`, in whatever parts memory allows."""

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wanduet.doors.python.parts import PipelineParts
from wanduet.engine.job import Job
from wanduet.engine.ladder import decode_modes
from wanduet.errors import OutOfMemoryError
from wanduet.models.vae.stream import decode_stream

log = logging.getLogger(__name__)

Frames = NDArray[np.uint8]  # [F, H, W, 3]


def decode_videos(parts: PipelineParts, latents: Tensor, job: Job | None = None) -> list[Frames]:
    """Normalised latents `[B, 16, T, h, w]` to a video each. `job`: the call's plan; made here if it is left out."""
    if job is None:
        vae = parts.spec.vae
        frames, height, width = latents.shape[2:]
        size = (height * vae.spatial_stride, width * vae.spatial_stride, (frames - 1) * vae.temporal_stride + 1)
        job = parts.job(*size, guided=False)
    return [_frames(parts, job, one) for one in latents.float().cpu()]


def _frames(parts: PipelineParts, job: Job, latents: Tensor) -> Frames:
    """One video, going down the ladder if memory runs out."""
    for device, mode in decode_modes(job):
        try:
            with parts.models.vae(job, device) as vae:
                return np.concatenate([chunk.copy() for chunk in decode_stream(vae, latents, mode)])
        except torch.OutOfMemoryError:
            log.warning("Out of memory while decoding; going on in smaller parts.")
        parts.models.make_room(device)
    raise OutOfMemoryError("Decoding ran out of memory in its smallest form.")


def as_output(videos: list[Frames], output_type: str) -> Any:
    """As diffusers gives frames: `np` `[B, F, H, W, 3]`, `pt` `[B, F, 3, H, W]`, both float32 in 0..1, or `pil` lists."""
    if output_type == "pil":
        from PIL import Image

        return [[Image.fromarray(frame) for frame in video] for video in videos]
    values = np.stack(videos).astype(np.float32) / 255.0
    return values if output_type == "np" else torch.from_numpy(values).permute(0, 1, 4, 2, 3)
