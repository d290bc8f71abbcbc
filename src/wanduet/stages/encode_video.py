"""Encode an input video to latents on one device; on out-of-memory, retry in a smaller form."""

import logging
from collections.abc import Callable, Generator, Iterator

import torch
from torch import Tensor

from wanduet.errors import OutOfMemoryError
from wanduet.models.vae.encode import Frames, encode_stream
from wanduet.planning.plan import Plan
from wanduet.runtime.context import Event, RunContext
from wanduet.runtime.models import Models
from wanduet.stages.fallback import encode_modes
from wanduet.stages.record import VideoRecord

log = logging.getLogger(__name__)


def encode_video(
    models: Models,
    plan: Plan,
    frames: Callable[[], Iterator[Frames]],
    record: VideoRecord,
    context: RunContext,
    num_frames: int = 0,
) -> Tensor:
    """Encode frames to normalised latents `[16, T, h, w]`, float32 on the host.

    `frames` returns chunks of frames as `encode_stream` takes them. It is called again, for the first frame on,
    each time the encode restarts. `num_frames`: how many there are, for the progress events; 0 if unknown.

    On out-of-memory, restart with more row tiles, finally on the CPU. Raises OutOfMemoryError when no smaller form is
    left, NonFiniteFramesError, WeightsError, CancelledError, and any error of `frames`.
    """

    def show(done: int) -> None:
        context.check_cancelled()
        context.emit(Event("encode_video", done, max(done, num_frames), record.index))

    def attempt(device: str, num_tiles: int) -> Tensor:
        with models.encoder(plan, device, context) as vae:
            chunks = frames()
            try:
                with context.timed("encode_video_s"):
                    return encode_stream(vae, chunks, num_tiles, show)
            finally:
                if isinstance(chunks, Generator):
                    chunks.close()  # its file, also if an error's traceback keeps the generator

    problem = ""
    for device, num_tiles in encode_modes(plan.vae, context):
        context.check_cancelled()  # `encode_modes` may have waited for memory
        if problem:
            log.warning("Out of memory while encoding the input video; going on with %d strips.", num_tiles)
            context.note(f"encode_video: {num_tiles} strips on {device}")
        try:
            return attempt(device, num_tiles)
        except torch.OutOfMemoryError as error:
            problem = str(error).split(". ")[0]
        models.transformer.evict(device)
    raise OutOfMemoryError(f"Encoding the input video ran out of memory in its smallest form ({problem}).")
