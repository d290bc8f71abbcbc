"""What is tried when memory runs out although the plan said it would not: smaller and slower, never lost.

Each rung is written into the job, so the video's metadata says that it was used.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch

from wanduet.engine.build import Denoiser, release_memory
from wanduet.engine.job import Job
from wanduet.engine.memory import ModelMemory
from wanduet.errors import OutOfMemoryError
from wanduet.models.vae_rows import DecodePlan

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# Before the last rung: another program may be about to give its memory back.
WAIT_SECONDS = 10.0
SMALLER_DECODES = (DecodePlan("frame", 4), DecodePlan("strip", 4), DecodePlan("strip", 8), DecodePlan("strip", 16))


class DenoiseLadder:
    """Runs one forward; on running out of memory goes a rung down and runs it again. No step is lost."""

    def __init__(self, job: Job, denoiser: Denoiser) -> None:
        self._job, self._denoiser = job, denoiser
        self._rungs = self._remaining()

    def __call__(self, forward: Callable[[], Result]) -> Result:
        """The forward's result. Raises OutOfMemoryError when every rung was used."""
        while True:
            try:
                return forward()
            except torch.OutOfMemoryError as error:
                problem = str(error).split(". ")[0]
            # Outside the handler: its traceback holds the failed forward's tensors.
            release_memory()
            rung = next(self._rungs, None)
            if rung is None:
                raise OutOfMemoryError(
                    f"The denoise ran out of memory on {self._denoiser.device} in its smallest form ({problem}).",
                    hint="Use fewer frames or a smaller size; `wanduet plan` says what fits.",
                )
            log.warning("Out of memory while denoising (%s); going on with %s.", problem, rung)
            self._job.rungs.append(f"denoise: {rung}")

    def _remaining(self) -> Iterator[str]:
        """Each rung is made when it is asked for."""
        yield "emptied cache"
        yield from self._smaller()
        time.sleep(WAIT_SECONDS)
        yield f"waited {WAIT_SECONDS:g} s"

    def _smaller(self) -> Iterator[str]:
        transformer = self._denoiser.transformer
        if transformer.runtime.share_first:
            transformer.runtime = replace(transformer.runtime, share_first=False)
            yield "nothing kept from one prompt to the next"
        layers = len(transformer.blocks)
        for resident in (layers // 2, layers // 4, 0):
            if self._denoiser.device.type != "cpu" and resident < self._denoiser.resident_blocks:
                self._denoiser.restream(resident)
                yield f"{resident} of {layers} blocks on the device"


def decode_modes(job: Job) -> Iterator[tuple[str, DecodePlan]]:
    """`(device, mode)` to decode with: the plan's, then smaller ones, at last on the CPU."""
    plan = job.plan
    yield plan.vae_device, plan.decode
    smaller = [m for m in SMALLER_DECODES if (m.order == "strip", m.num_strips) > _size(plan.decode)]
    for mode in smaller:
        yield plan.vae_device, mode
    if plan.vae_device != "cpu":
        time.sleep(WAIT_SECONDS)
        yield plan.vae_device, SMALLER_DECODES[-1]
        yield "cpu", DecodePlan("strip", 8)


def reserve_decode(job: Job, memory: ModelMemory) -> None:
    """Make sure, before the denoise, that the decode will have its memory: take it once, and keep it in the
    allocator's cache, out of other programs' reach. Where it cannot be had, the job's plan gets a smaller decode.
    """
    device = torch.device(job.plan.vae_device)
    taking_turns = job.plan.transformer_device == job.plan.vae_device and not job.plan.keep_both
    if device.type != "cuda" or taking_turns:  # the decode's room is the transformer's until then
        return
    r = job.request
    size = (r.generated_height, r.generated_width, r.num_frames)
    for name, mode in decode_modes(job):
        if name == "cpu":
            return  # the decode's own ladder will end there if nothing changes
        needed = memory.decode(size, mode, job.plan.vae_dtype, name)
        try:
            if needed > _cached_bytes(device):  # of a decode before, perhaps
                torch.empty(needed, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            release_memory()
            continue
        if mode != job.plan.decode:
            job.rungs.append(f"decode: planned as {mode.order}-major, {mode.num_strips} strips: less memory is free")
            job.plan = replace(job.plan, decode=mode)
        return


def _cached_bytes(device: torch.device) -> int:
    """What the allocator holds and nothing uses."""
    if not torch.cuda.is_available():
        return 0
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _size(mode: DecodePlan) -> tuple[bool, int]:
    return mode.order == "strip", mode.num_strips
