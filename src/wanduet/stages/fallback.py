"""The out-of-memory fallback: if memory runs out despite the plan, retry in smaller and slower forms.

Each fallback is recorded with the video and appears in its metadata.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch

from wanduet.errors import KernelFailedError, OutOfMemoryError
from wanduet.footprint.phases import ModelMemory
from wanduet.models.vae.rows import Tiling
from wanduet.planning.plan import Plan, VAEPlan
from wanduet.planning.planner import LATER_JOBS_SHARE
from wanduet.planning.search import ENCODE_TILES
from wanduet.request import ResolvedRequest
from wanduet.runtime.context import RunContext
from wanduet.runtime.loaded import LoadedTransformer
from wanduet.runtime.release import release_memory

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# Before the last attempt: another program may free its memory meanwhile.
WAIT_SECONDS = 10.0
SMALLER_DECODES = (Tiling("frame", 4), Tiling("strip", 4), Tiling("strip", 8), Tiling("strip", 16))


class DenoiseFallback:
    """Runs one forward. On out-of-memory, it reduces memory use by one level and reruns the forward. If a kernel fails,
    it reruns with what replaces the kernel. No denoising step is lost."""

    def __init__(self, context: RunContext, denoiser: LoadedTransformer) -> None:
        self._context, self._denoiser = context, denoiser
        # A function's generator, not a method's: a method's would refer to this object, and only Python's cyclic
        # garbage collection would free the model's memory.
        self._remaining = _smaller_denoises(context, denoiser)

    def __call__(self, forward: Callable[[], Result]) -> Result:
        """Return the forward's result. Raises OutOfMemoryError when no smaller form is left, and CancelledError before
        a retry if the job is cancelled."""
        while True:
            try:
                return forward()
            except KernelFailedError as error:
                failed = error
            except torch.OutOfMemoryError as error:
                failed, problem = None, str(error).split(". ")[0]
            if failed is not None:
                self._context.check_cancelled()
                instead = self._denoiser.without_kernel(failed.operation)
                log.warning("%s Going on with %s.", failed.message, instead)
                self._context.note(f"denoise: {instead} ({failed.reason})")
                continue
            # Outside the except block: the traceback there keeps the failed forward's tensors alive.
            release_memory()
            self._context.check_cancelled()
            smaller = next(self._remaining, None)
            self._context.check_cancelled()  # the generator may have waited
            if smaller is None:
                raise OutOfMemoryError(
                    f"The denoise ran out of memory on {self._denoiser.device} in its smallest form ({problem}).",
                    hint="Use fewer frames or a smaller size; `wanduet plan` says what fits.",
                )
            log.warning("Out of memory while denoising (%s); going on with %s.", problem, smaller)
            self._context.note(f"denoise: {smaller}")


def _smaller_denoises(context: RunContext, denoiser: LoadedTransformer) -> Iterator[str]:
    """Apply one memory reduction per `next()`, and yield its description."""
    yield "emptied cache"
    transformer = denoiser.transformer
    if transformer.runtime.share_first:
        transformer.runtime = replace(transformer.runtime, share_first=False)
        yield "nothing kept from one prompt to the next"
    layers = len(transformer.blocks)
    for resident in (layers // 2, layers // 4, 0):
        if denoiser.device.type != "cpu" and resident < denoiser.resident_blocks:
            denoiser.restream(resident)
            yield f"{resident} of {layers} blocks on the device"
    context.wait(WAIT_SECONDS)
    yield f"waited {WAIT_SECONDS:g} s"


def decode_modes(plan: VAEPlan, context: RunContext) -> Iterator[tuple[str, Tiling]]:
    """Yield `(device, tiling)` to decode with: the plan's, then smaller ones, finally the CPU."""
    yield plan.device, plan.tiling
    smaller = [m for m in SMALLER_DECODES if (m.order == "strip", m.num_tiles) > _size(plan.tiling)]
    for mode in smaller:
        yield plan.device, mode
    if plan.device != "cpu":
        context.wait(WAIT_SECONDS)
        yield plan.device, SMALLER_DECODES[-1]
        yield "cpu", Tiling("strip", 8)


def encode_modes(plan: VAEPlan, context: RunContext) -> Iterator[tuple[str, int]]:
    """Yield `(device, number of row tiles)` to encode with: the plan's, then smaller ones, finally the CPU."""
    yield plan.device, plan.encode_tiles
    for num_tiles in ENCODE_TILES:
        if num_tiles > plan.encode_tiles:
            yield plan.device, num_tiles
    if plan.device != "cpu":
        context.wait(WAIT_SECONDS)
        yield plan.device, ENCODE_TILES[-1]
        yield "cpu", 8


def reserve_decode(plan: Plan, request: ResolvedRequest, memory: ModelMemory, context: RunContext) -> Plan:
    """Reserve the decode's memory before the denoise: allocate it once and leave it in the allocator's cache, where
    other programs cannot take it.

    Return the plan, with a smaller decode if that much memory cannot be allocated.
    """
    device = torch.device(plan.vae.device)
    swapping = plan.transformer.device == plan.vae.device and not plan.both_resident
    if device.type != "cuda" or swapping:  # until the decode, the transformer occupies that memory
        return plan
    size = (request.generated_height, request.generated_width, request.num_frames)
    for name, mode in decode_modes(plan.vae, context):
        context.check_cancelled()
        if name == "cpu":
            break  # leave the plan as it is: the decode's own fallback ends on the CPU too
        # Includes the VAE's weights, which the first job loads into this memory. Never more than planned: in later jobs
        # the VAE and the libraries' workspaces are allocated already.
        planned = next(int(one.peak / (1 + LATER_JOBS_SHARE)) for one in plan.prediction.devices if one.name == name)
        needed = memory.decode(size, mode, plan.vae.dtype, name) + memory.vae_weights(plan.vae.dtype)
        needed = min(needed, planned - _allocated_bytes(device))
        try:
            if needed > _cached_bytes(device):  # an earlier decode may have left enough
                release_memory()  # smaller cached blocks would stay unused beside the new one
                torch.empty(needed, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            release_memory()
            continue
        if mode != plan.vae.tiling:
            context.note(f"decode: planned as {mode.order}-major, {mode.num_tiles} strips: less memory is free")
            return replace(plan, vae=replace(plan.vae, tiling=mode))
        break
    return plan


def _allocated_bytes(device: torch.device) -> int:
    """Bytes that tensors occupy on the device."""
    return torch.cuda.memory_allocated(device) if torch.cuda.is_available() else 0


def _cached_bytes(device: torch.device) -> int:
    """Bytes that the allocator has reserved and no tensor uses."""
    if not torch.cuda.is_available():
        return 0
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _size(mode: Tiling) -> tuple[bool, int]:
    return mode.order == "strip", mode.num_tiles
