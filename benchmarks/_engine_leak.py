"""What stays of engines that were closed, and what later jobs of one engine take beside what the plan says.

    python benchmarks/_engine_leak.py [--engines 10] [--ranks-engines 3] [--jobs 3]

Engines of each strategy are made, used and closed, one after another, in one process: all jobs but one succeed, one is
cancelled, one fails. After each close the allocators' and the driver's figures are printed, and where more stays than
after the first engine, the tensors that are left. Ends with 1 if memory has grown by more than `--limit` MiB.
"""

import argparse
import contextlib
import gc
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import TINY

from wanduet.config import EngineConfig
from wanduet.engine.job import OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.errors import WanduetError
from wanduet.request import GenerationRequest
from wanduet.sampling.denoise import StepInfo

MIB = 2**20
REQUEST = {"prompt": "a cat", "height": 480, "width": 832, "num_frames": 5, "num_inference_steps": 2, "seed": 1}
if TINY:
    REQUEST |= {"height": 32, "width": 32}
GPUS = 0 if TINY else torch.cuda.device_count()


def strategies() -> dict[str, dict[str, Any]]:
    """Engine settings by name: all that this machine has devices for."""
    if not GPUS:
        both = {"placed": "vae=cpu,transformer=cpu", "parallel": "cpu,cpu"}
        return {"single": {"devices": "cpu"}} | {name: {"devices": devices} for name, devices in both.items()}
    found: dict[str, dict[str, Any]] = {
        "single": {"devices": "cuda:0"},
        # So little that blocks wait in host memory, and VAE and transformer make room for each other.
        "single, streamed": {"devices": "cuda:0", "vram_limit": 3 * 2**30},
    }
    if GPUS > 1:
        found["placed"] = {"devices": "vae=cuda:0,transformer=cuda:1"}
        found["parallel"] = {"devices": "cuda:0,cuda:1"}
    return found


def figures() -> dict[str, dict[str, float]]:
    """MiB by device: what tensors take, what the allocator keeps, what the driver says that all processes use."""
    found = {}
    for index in range(GPUS):
        torch.cuda.synchronize(index)
        free, total = torch.cuda.mem_get_info(index)
        found[f"cuda:{index}"] = {
            "allocated": round(torch.cuda.memory_allocated(index) / MIB, 1),
            "reserved": round(torch.cuda.memory_reserved(index) / MIB, 1),
            "used": round((total - free) / MIB, 1),
        }
    return found


def left_tensors(most: int = 10) -> list[str]:
    """The largest tensors on GPUs that Python still knows, and what refers to them."""
    tensors = []
    for one in gc.get_objects():
        with contextlib.suppress(Exception):  # some objects do not like to be asked
            if isinstance(one, torch.Tensor) and one.is_cuda and one.untyped_storage().nbytes():
                tensors.append(one)
    tensors.sort(key=lambda tensor: -tensor.untyped_storage().nbytes())
    told = []
    for tensor in tensors[:most]:
        holders = sorted({type(holder).__name__ for holder in gc.get_referrers(tensor) if holder is not tensors})
        told.append(f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, held by {', '.join(holders)}")
    return told


def use(settings: dict[str, Any], jobs: int, folder: Path, tell: bool) -> None:
    """One engine: jobs that succeed, one that is cancelled, one that fails; then it is closed."""

    def fail(info: StepInfo) -> None:
        raise RuntimeError("on purpose")

    with Engine(EngineConfig(model="random:1.3b" if not TINY else "miniature", data_dir=folder, **settings)) as engine:
        for number in range(jobs):
            for index in range(GPUS):
                torch.cuda.reset_peak_memory_stats(index)
            job = engine.submit(GenerationRequest(**REQUEST), OutputOptions(folder / f"{number}.mp4"))
            result = job.result(600)
            if tell:
                measured = {
                    f"cuda:{index}": {
                        "reserved": round(torch.cuda.max_memory_reserved(index) / MIB, 1),
                        "allocated": round(torch.cuda.max_memory_allocated(index) / MIB, 1),
                    }
                    for index in range(GPUS)
                }
                predicted = {
                    d.name: {k: round(v / MIB, 1) for k, v in d.phases.items()} for d in job.plan.prediction.devices
                }
                row = {"job": number + 1, "strategy": job.plan.strategy, "predicted_mib": predicted}
                row |= {"peak_mib": measured, "told_mib": _mib(result.peak_memory_bytes), "rungs": job.notes}
                print("   ", json.dumps(row), flush=True)
        cancelled = engine.submit(GenerationRequest(**REQUEST), OutputOptions(folder / "cancelled.mp4"))
        cancelled.cancel()
        with contextlib.suppress(Exception):
            cancelled.result(600)
        if settings.get("strategy") != "parallel":  # whose steps no callback can follow
            failed = engine.submit(GenerationRequest(**REQUEST), OutputOptions(folder / "failed.mp4"), on_step=fail)
            with contextlib.suppress(Exception):
                failed.result(600)


def _mib(sizes: dict[str, int]) -> dict[str, float]:
    return {name: round(size / MIB, 1) for name, size in sizes.items()}


def main() -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=10)
    parser.add_argument("--ranks-engines", type=int, default=3, help="of strategy parallel, which starts processes")
    parser.add_argument("--jobs", type=int, default=3, help="of the first engine of each strategy; the others run one")
    parser.add_argument(
        "--limit", type=float, default=64.0, help="MiB that may stay more after the last than the first"
    )
    parser.add_argument("--only", help="the name of one strategy")
    options = parser.parse_args()
    logging.getLogger("wanduet").setLevel(logging.CRITICAL)  # what fails here is meant to
    grown = False
    print("before any engine:", json.dumps(figures()), flush=True)
    for name, settings in strategies().items():
        if options.only and options.only != name:
            continue
        named = {"strategy": "parallel"} if name == "parallel" else {}
        first: dict[str, dict[str, float]] | None = None
        print(f"== {name}", flush=True)
        for number in range(options.ranks_engines if name == "parallel" else options.engines):
            began = time.perf_counter()
            try:
                with tempfile.TemporaryDirectory() as folder:
                    use(settings | named, options.jobs if number == 0 else 1, Path(folder), tell=number == 0)
            except WanduetError as error:
                print(f"  engine {number + 1} failed: {error}", flush=True)
            now = figures()  # nothing is collected here: closing has to do it
            seconds = round(time.perf_counter() - began, 1)
            print(f"  engine {number + 1} closed after {seconds} s:", json.dumps(now), flush=True)
            first = first or now
            more = {
                (device, kind): now[device][kind] - first[device][kind]
                for device in now
                for kind in ("allocated", "reserved", "used")
            }
            worse = {f"{device} {kind}": mib for (device, kind), mib in more.items() if mib > options.limit}
            if worse:
                grown = True
                print("  GROWN", json.dumps(worse), *left_tensors(), sep="\n    ", flush=True)
    print("grown" if grown else "nothing has grown", flush=True)
    return int(grown)


if __name__ == "__main__":
    sys.exit(main())
