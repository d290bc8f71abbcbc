"""Decodes latents to frames for `WanPipeline`, in tiles that fit into memory."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wanduet.doors.python.parts import PipelineParts
from wanduet.planning.plan import Plan
from wanduet.runtime.context import NO_JOB
from wanduet.stages.decode import as_array, decode
from wanduet.stages.record import VideoRecord

Frames = NDArray[np.uint8]  # [F, H, W, 3]


def decode_videos(parts: PipelineParts, latents: Tensor, plan: Plan | None = None) -> list[Frames]:
    """Decode normalised latents `[B, 16, T, h, w]` to B videos. `plan` is the call's; None makes one.

    Raises OutOfMemoryError, NonFiniteFramesError.
    """
    if plan is None:
        vae = parts.spec.vae
        frames, height, width = latents.shape[2:]
        size = (height * vae.spatial_stride, width * vae.spatial_stride, (frames - 1) * vae.temporal_stride + 1)
        _, plan = parts.plan_video(size, guided=False)
    return [
        decode(parts.models, plan, one, as_array, VideoRecord(index, 0), NO_JOB)
        for index, one in enumerate(latents.float().cpu())
    ]


def as_output(videos: list[Frames], output_type: str) -> Any:
    """Convert videos to diffusers' output.

    `np`: `[B, F, H, W, 3]`; `pt`: `[B, F, 3, H, W]`; both float32 in 0..1. `pil`: a list of PIL images for each video.
    """
    if output_type == "pil":
        from PIL import Image

        return [[Image.fromarray(frame) for frame in video] for video in videos]
    values = np.stack(videos).astype(np.float32) / 255.0
    return values if output_type == "np" else torch.from_numpy(values).permute(0, 1, 4, 2, 3)
