"""Decode latents to frames on one device; on out-of-memory or a failed kernel, retry in a smaller or plainer form."""

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from wanduet.errors import KernelFailedError, OutOfMemoryError
from wanduet.models.vae.rows import Tiling
from wanduet.models.vae.stream import Frames, decode_stream
from wanduet.planning.plan import Plan
from wanduet.runtime.context import Event, RunContext
from wanduet.runtime.models import Models
from wanduet.stages.fallback import decode_modes
from wanduet.stages.record import VideoRecord

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Sink = Callable[[Iterator[Frames]], Result]
"""Consumes all frames of a video, in chunks `[t, H, W, 3]` uint8 whose memory is reused: writes a file or builds an
array, for example. It is called again, from the first frame on, each time the decode restarts."""


def as_array(frames: Iterator[Frames]) -> Frames:
    """Sink that returns all frames as one array."""
    return np.concatenate([chunk.copy() for chunk in frames])


def decode(
    models: Models, plan: Plan, latents: Tensor, sink: Sink[Result], record: VideoRecord, context: RunContext
) -> Result:
    """Decode latents `[16, T, h, w]` (normalised) into a sink and return the sink's result.

    On out-of-memory, restart with smaller row tiles, finally on the CPU. If a kernel fails, restart with its PyTorch
    implementation. Raises OutOfMemoryError when no smaller form is left, NonFiniteFramesError, CancelledError, and any
    error of the sink.
    """

    def show(done: int, total: int) -> None:
        context.check_cancelled()  # tile by tile, frames come only at the end
        context.emit(Event("decode", done, total, record.index))

    def attempt(device: str, tiling: Tiling) -> Result:
        """Decode in one way; replace a kernel that fails by its plain form, and begin again."""
        while True:
            try:
                with models.decoder(plan, device, context) as vae:
                    record.vae_kernels = vae.kernels.name
                    return sink(decode_stream(vae, latents, tiling, show))
            except KernelFailedError as error:
                failed = error
            context.check_cancelled()
            log.warning("%s Decoding with its plain form.", failed.message)
            context.note(f"decode: plain {failed.operation} ({failed.reason})")
            models.vae.without_kernel(failed.operation)

    problem = ""
    for device, tiling in decode_modes(plan.vae, context):
        context.check_cancelled()  # `decode_modes` may have waited for memory
        if problem:
            message = "Out of memory while decoding; going on with %d strips, %s-major."
            log.warning(message, tiling.num_tiles, tiling.order)
            context.note(f"decode: {tiling.order}-major, {tiling.num_tiles} strips on {device}")
        try:
            return attempt(device, tiling)
        except torch.OutOfMemoryError as error:
            problem = str(error).split(". ")[0]
        models.transformer.evict(device)
    raise OutOfMemoryError(f"Decoding ran out of memory in its smallest form ({problem}).")
