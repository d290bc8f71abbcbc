"""What all benchmarks share: the header of a result, timing, peak memory, tables, result files.

Set `TINY=1` to run any of them on a CPU in seconds, with small shapes, to see that they work.
"""

import gc
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from wanduet.family.spec import VAESpec
from wanduet.kernels.device import prepare_allocator
from wanduet.kernels.select import vae_kernels_for
from wanduet.models.vae.model import WanVAE

TINY = os.environ.get("TINY") == "1"
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() and not TINY else torch.device("cpu")
ON_GPU = DEVICE.type == "cuda"
prepare_allocator(DEVICE)
GIB = 2**30
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "diffusers", "transformers", "flash-attn-4", "quack-kernels", "nvidia-cutlass-dsl", "av")

# Latent frames, rows and columns of 81-frame videos (480x832, 720x1280, 1088x1920).
LATENT_SIZES = {"480p": (21, 60, 104), "720p": (21, 90, 160), "1080p": (21, 136, 240)}
if TINY:
    LATENT_SIZES = {"480p": (3, 8, 8), "720p": (3, 8, 12), "1080p": (3, 12, 12)}


def header() -> dict[str, Any]:
    """The machine, the versions, the command, the commit, the time: stands first in every result file."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    machine: dict[str, Any] = {"cpu_cores": os.cpu_count(), "platform": platform.machine()}
    if ON_GPU:
        properties = torch.cuda.get_device_properties(DEVICE)
        versions["torch"], versions["cuda"] = torch.__version__, str(torch.version.cuda)
        versions["cudnn"] = str(torch.backends.cudnn.version())
        machine |= {"gpu": properties.name, "gpus": torch.cuda.device_count()}
        machine["gpu_memory_gib"] = round(properties.total_memory / GIB, 1)
    return {
        "machine": machine,
        "versions": versions,
        "command": shlex.join(["python", _relative(sys.argv[0]), *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "tiny": TINY,
    }


def _relative(path: str) -> str:
    with suppress(ValueError):
        return str(Path(path).resolve().relative_to(Path(__file__).parents[1]))
    return Path(path).name


def _commit() -> str:
    """`WANDUET_COMMIT` where the tree was copied without its history."""
    if given := os.environ.get("WANDUET_COMMIT"):
        return given
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    return "unknown"


def synchronize(device: torch.device = DEVICE) -> None:
    """Wait until a device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(fn: Callable[[], object], runs: int = 5, warmup: int = 1) -> float:
    """Median seconds of a call; by events on the device where there is one."""
    for _ in range(warmup):
        fn()
    synchronize()
    return statistics.median(_timed_once(fn) for _ in range(runs))


def _timed_once(fn: Callable[[], object]) -> float:
    if not ON_GPU:
        start = time.perf_counter()
        fn()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    fn()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def timed_in_a_row(fn: Callable[[], object], calls: int = 10, runs: int = 5) -> float:
    """Median seconds of a call among `calls` without a pause, as in a model: launching the next one takes no time of its own."""
    fn()
    return timed(lambda: [fn() for _ in range(calls)], runs) / calls


def clear_memory() -> None:
    """Drop what is not used any more, cuBLAS's workspaces too, and start a new count of the peak."""
    gc.collect()
    if ON_GPU:
        torch._C._cuda_clearCublasWorkspaces()  # else what ran before would count, and lie among what comes
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, float]:
    """GiB at the peak since `clear_memory`: what tensors took, and what the allocator held for them."""
    if not ON_GPU:
        return {"peak_allocated_gib": 0.0, "peak_reserved_gib": 0.0}
    return {
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
    }


def random_vae(spec: VAESpec, dtype: torch.dtype, device: torch.device = DEVICE) -> WanVAE:
    """Random weights, its decoder on a device, as the engine prepares it."""
    vae = WanVAE(spec).to(dtype).eval().requires_grad_(False)
    for part in vae.decoding_parts:
        part.to(device)
    if device.type == "cuda":
        vae.channels_last()
        vae.round_to_tf32()
    vae.use_kernels(vae_kernels_for(device, dtype, spec.base_dim))
    return vae


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """`|got - expected| / |expected|` in float64."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows as aligned text; columns default to all keys in the order of their appearance."""
    rows = list(rows)
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:.4g}"
    return str(value)


@dataclass
class Report:
    """Collects rows under section names, prints them as they come, and writes the result file."""

    name: str
    sections: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, section: str, **row: Any) -> None:
        self.sections.setdefault(section, []).append(row)
        print(section, json.dumps(row), flush=True)

    def run(self, sections: Mapping[str, Callable[["Report"], None]], chosen: Sequence[str]) -> None:
        """Run the named sections. One that fails is reported, the others still run; written after each."""
        for name in chosen:
            start = time.perf_counter()
            try:
                sections[name](self)
            except Exception as problem:
                if TINY:
                    raise
                self.add("failed", name=name, problem=f"{type(problem).__name__}: {problem}"[:300])
            print(f"# {name}: {time.perf_counter() - start:.1f} s", flush=True)
            clear_memory()
            self.write()

    def write(self) -> None:
        """To `benchmarks/results/` (not when tiny), and to the folder `$OUT` where it is set."""
        content = json.dumps({"benchmark": self.name, **header(), "sections": self.sections}, indent=1) + "\n"
        folders = [] if TINY else [RESULTS]
        if out := os.environ.get("OUT"):
            folders.append(Path(out))
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{self.name}.json").write_text(content)

    def print(self) -> None:
        """All sections as tables."""
        for section, rows in self.sections.items():
            print(f"\n== {section}\n{table(rows)}")
