"""Decode latents to frames on one device; on out-of-memory or a failed kernel, retry in a smaller or plainer form."""

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
"""Consumes all frames of a video, in chunks `[t, H, W, 3]` uint8 whose memory is reused: writes a file or builds an
array, for example. It is called again, from the first frame on, each time the decode restarts."""


def decode(
    models: Models, plan: Plan, latents: Tensor, sink: Sink[Result], record: VideoRecord, context: RunContext
) -> Result:
    """Decode latents `[16, T, h, w]` (normalised) into a sink and return the sink's result.

    On out-of-memory, restart with smaller row tiles, finally on the CPU. If a kernel fails, restart with its PyTorch
    implementation. Raises OutOfMemoryError when no smaller form is left, NonFiniteFramesError, CancelledError, and any
    error of the sink.
    """
    problem = ""
    for device, mode in decode_modes(plan.vae, context):
        context.check_cancelled()  # `decode_modes` may have waited for memory
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
    """Decode on one device with one tiling. Replace a kernel that fails by its PyTorch implementation and restart."""
    (device, mode), (record, context) = how, run

    def show(done: int, total: int) -> None:
        context.check_cancelled()  # here too: with row tiles, the first frames come only at the end
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
