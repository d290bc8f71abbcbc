"""Latents to frames on one device: smaller and slower where memory runs out or a kernel fails, not lost."""

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

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
"""Takes all frames of a video, in chunks `[t, H, W, 3]` uint8 that are reused: a file's writer, or what makes an array of
them. It is called again, with the first frame, where the decode has to begin again."""


def decode(
    models: Models, plan: Plan, latents: Tensor, sink: Sink[Result], record: VideoRecord, context: RunContext
) -> Result:
    """Decode latents `[16, T, h, w]` (normalised) into a sink, and return what that returns.

    It begins again in smaller parts each time that memory runs out, at last on the CPU, and with the plain form of a
    kernel that failed. Raises OutOfMemoryError when nothing smaller is left, NonFiniteFramesError, CancelledError, and
    what the sink raises.
    """
    problem = ""
    for device, mode in decode_modes(plan.vae, context):
        context.check_cancelled()  # it may have waited for memory
        if problem:
            log.warning("Out of memory while decoding; going on with %d strips, %s-major.", mode.num_tiles, mode.order)
            context.note(f"decode: {mode.order}-major, {mode.num_tiles} strips on {device}")
        try:
            return _decode_as(models, plan, latents, (device, mode), sink, (record, context))
        except torch.OutOfMemoryError as error:
            problem = str(error).split(". ")[0]
        models.transformer.evict(device)
    raise OutOfMemoryError(f"Decoding ran out of memory in its smallest form ({problem}).")


def _decode_as(
    models: Models,
    plan: Plan,
    latents: Tensor,
    how: tuple[str, Tiling],
    sink: Sink[Result],
    run: tuple[VideoRecord, RunContext],
) -> Result:
    """On a device, in a mode; a kernel that fails is replaced by its plain form, and the decode begins again."""
    (device, mode), (record, context) = how, run

    def show(done: int, total: int) -> None:
        context.check_cancelled()  # strip by strip, frames come only at the end
        context.emit(Event("decode", done, total, record.index))

    while True:
        try:
            with models.decoder(plan, device, context) as vae:
                record.vae_kernels = vae.kernels.name
                return sink(decode_stream(vae, latents, mode, show))
        except KernelFailedError as error:
            failed = error
        context.check_cancelled()
        log.warning("%s Decoding with its plain form.", failed.message)
        context.note(f"decode: plain {failed.operation} ({failed.reason})")
        models.vae.without_kernel(failed.operation)
