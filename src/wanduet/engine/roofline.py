"""Compares the seconds of each stage of a job with the lower bound of its work on this machine.

The bound is the roofline model's: the time of the floating-point operations at the rate of a large matrix product, or
of the bytes moved at the rate of a large copy, whichever is longer. Both rates are measured on the device. Source of
the model: Williams et al., "Roofline", CACM 52(4), 2009.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from wanduet.accelerate.skipped_steps import Forwards
from wanduet.engine.job import Job
from wanduet.footprint.phases import DTYPE_BYTES, ModelMemory, text_compute_dtype, text_encoder_bytes
from wanduet.kernels.device import on_device_of
from wanduet.kernels.precision import EXACT, PRODUCTS
from wanduet.planning.cost import decode_flop, denoise_flop

RUNS = 3
SIDE_GPU, SIDE_CPU = 8192, 2048  # rows and columns of the multiplied matrices
COPY_GPU, COPY_CPU = 2**30, 2**28  # copied bytes


@dataclass(frozen=True, slots=True)
class Peaks:
    """The peak rates of a device, per second: floating-point operations, and bytes read or written."""

    flop: float
    bytes: float


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a stage: at least so many floating-point operations and bytes moved, on a device in a dtype."""

    flop: float
    bytes: float
    device: str
    dtype: str

    def floor(self, peaks: Peaks) -> float:
        """Return the lower bound in seconds on a device with these peak rates."""
        return max(self.flop / peaks.flop, self.bytes / peaks.bytes)


def work_of(job: Job, memory: ModelMemory) -> dict[str, Work]:
    """Return the work of each computing stage, by the name of its timing, summed over the job's videos.

    The bytes are a lower bound: the weights, read once per pass, and the decoded pixels. The text encoder is left out
    if the job spent no time on it.
    """
    request, plan, spec = job.request, job.plan, memory.spec
    size = (request.generated_height, request.generated_width, request.num_frames)
    videos, ranks = request.num_videos_per_prompt, max(1, len(plan.group.ranks))
    passes = videos * Forwards.of(request, spec).count
    weights = memory.transformer_weights(plan.transformer.dtype)
    vae_bytes = memory.vae_weights(plan.vae.dtype) * spec.latent_shape(*size)[1]
    pixels = 3 * size[0] * size[1] * size[2]
    work = {
        "denoise_s": Work(
            denoise_flop(request, spec) / ranks, passes * weights / ranks, plan.transformer.device, plan.transformer.dtype
        ),
        "decode_s": Work(
            videos * decode_flop(spec, size) / ranks, videos * (vae_bytes + pixels) / ranks, plan.vae.device, plan.vae.dtype
        ),
    }  # fmt: skip
    if job.timings["encode_s"] > 0:
        dtype = text_compute_dtype(plan.text.dtype)
        read = text_encoder_bytes(spec, plan.text.dtype, "resident")
        tokens = 2 * text_encoder_bytes(spec, dtype, "resident") // DTYPE_BYTES[dtype]  # one token through every weight
        work["encode_s"] = Work(tokens, read, plan.text.device, dtype)
    return work


def where_it_went(job: Job, memory: ModelMemory) -> list[dict[str, Any]]:
    """Return a row for each phase: seconds and share of the total; for computing stages also the floating-point
    operations (`tflop`), `gigabytes`, the lower bound in seconds (`floor_s`) and its share of the seconds (`of_floor`).
    Measures the devices' peak rates."""
    total = job.timings["total_s"] or 1.0
    work = work_of(job, memory)
    peaks = {key: measure_peaks(*key) for key in {(w.device, w.dtype) for w in work.values()}}
    rows = []
    for name, seconds in job.timings.items():
        row: dict[str, Any] = {
            "phase": name.removesuffix("_s"), "seconds": round(seconds, 3), "share": round(seconds / total, 3),
        }  # fmt: skip
        if (found := work.get(name)) is not None:
            floor = found.floor(peaks[found.device, found.dtype])
            if name == "encode_s" and seconds < floor:
                rows.append(row)  # the embeddings came from the cache
                continue
            row |= {"tflop": round(found.flop / 1e12, 3), "gigabytes": round(found.bytes / 1e9, 3)}
            row |= {"floor_s": round(floor, 3), "of_floor": round(floor / seconds, 3) if seconds else None}
        rows.append(row)
    return rows


@torch.no_grad()
def measure_peaks(device: str, dtype: str) -> Peaks:
    """Measure the rates of a large matrix product in `dtype` (on a GPU, float32 uses TF32, as in the VAE) and of a
    large copy. Both are infinite if the device has no memory for the measurement."""
    on = torch.device(device)
    gpu = on.type != "cpu"
    side, size = (SIDE_GPU, COPY_GPU) if gpu else (SIDE_CPU, COPY_CPU)
    try:
        with on_device_of(on), PRODUCTS.at("high" if gpu else EXACT):
            matrix = torch.randn(side, side, device=on).to(getattr(torch, dtype))
            flop = 2 * side**3 / _seconds(partial(torch.matmul, matrix, matrix), on)
            source, target = (torch.zeros(size, dtype=torch.uint8, device=on) for _ in range(2))
            return Peaks(flop, 2 * size / _seconds(partial(target.copy_, source), on))
    except torch.OutOfMemoryError:
        return Peaks(float("inf"), float("inf"))  # the lower bound becomes 0


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of RUNS runs, after one warm-up run."""

    def once() -> float:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    once()
    return statistics.median(once() for _ in range(RUNS))
