"""A call's videos: reads and encodes those that it begins with, decodes latents to those that it returns."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wanduet.doors.python.arguments import CallArguments
from wanduet.doors.python.parts import PipelineParts
from wanduet.models.vae.encode import Frames
from wanduet.planning.plan import Plan
from wanduet.runtime.context import NO_JOB
from wanduet.stages.decode import as_array, decode
from wanduet.stages.encode_video import encode_video
from wanduet.stages.record import VideoRecord

Decoded = NDArray[np.uint8]  # [F, H, W, 3]
# How far pixels may be outside of -1..1, as resizing makes them; beyond, the scale is another: 0..255.
ASIDE = 1.0


def read_videos(processor: Any, video: Any, call: CallArguments) -> Tensor:
    """Convert a call's `video` to pixels `[V, 3, F, H, W]` float32 in -1..1, in the call's size, as diffusers does.

    `processor`: diffusers' VideoProcessor. Raises ValueError for what is no video, and for a number of videos that does
    not fit the prompts.
    """
    if video is None:
        raise ValueError("Give video or latents.")
    if hasattr(video, "convert") or (isinstance(video, np.ndarray | Tensor) and video.ndim < 4):
        raise ValueError("video must be a video, not a picture: image to video needs another model of the family.")
    if not isinstance(video, list | np.ndarray | Tensor):
        kind = type(video).__name__
        raise ValueError(f"video must be frames, as a list of PIL images, an array or a tensor, not {kind}.")
    if len(video) == 0:
        raise ValueError("video has no frames.")
    try:
        pixels: Tensor = processor.preprocess_video(video, height=call.height, width=call.width).float()
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:  # depends on the type
        raise ValueError(f"video cannot be read: {error}") from error
    if pixels.ndim != 5 or pixels.shape[1] != 3 or pixels.shape[2] == 0:
        raise ValueError(f"The frames of video must have 3 colour channels, not {pixels.shape[1]}.")
    if not pixels.abs().amax() <= 1.0 + ASIDE:  # also if it is NaN
        raise ValueError("The frames of video must be PIL images, or floats in 0..1.")
    if len(pixels) not in (1, call.count) and call.count * call.copies > 1:
        raise ValueError(f"{len(pixels)} videos were given for {call.count} prompts.")
    return pixels


def encode_videos(parts: PipelineParts, videos: Tensor, plan: Plan) -> Tensor:
    """Encode videos `[V, 3, 4n + 1, H, W]` in -1..1 to normalised latents `[V, 16, n + 1, h, w]` float32 on the host.

    Raises OutOfMemoryError, NonFiniteFramesError.
    """
    stride = parts.spec.vae.temporal_stride

    def chunks(video: Tensor) -> Iterator[Frames]:
        first, rest = video.permute(1, 2, 3, 0).cpu().split([1, video.shape[1] - 1])
        yield from (chunk.numpy() for chunk in (first, *rest.split(stride)) if len(chunk))

    return torch.stack(
        [
            encode_video(parts.models, plan, partial(chunks, video), VideoRecord(index, 0), NO_JOB)
            for index, video in enumerate(videos)
        ]
    )


def decode_videos(parts: PipelineParts, latents: Tensor, plan: Plan | None = None) -> list[Decoded]:
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


def as_output(videos: list[Decoded], output_type: str) -> Any:
    """Convert videos to diffusers' output.

    `np`: `[B, F, H, W, 3]`; `pt`: `[B, F, 3, H, W]`; both float32 in 0..1. `pil`: a list of PIL images for each video.
    """
    if output_type == "pil":
        from PIL import Image

        return [[Image.fromarray(frame) for frame in video] for video in videos]
    values = np.stack(videos).astype(np.float32) / 255.0
    return values if output_type == "np" else torch.from_numpy(values).permute(0, 1, 4, 2, 3)
