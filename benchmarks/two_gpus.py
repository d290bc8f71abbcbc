"""Two GPUs against one of them, in one run: 1.3B in its true shapes, random weights, through the engine itself.

    PYTHONPATH=src python benchmarks/two_gpus.py [--sizes 480p,720p] [--steps 8] [section ...]

Sections: guided unguided batch latents diffusers (default: all). Each measures strategy `parallel` or
`placed` beside `single` on the first device; `ratio` is seconds on one device / seconds on both.
TINY=1 runs every section on two CPU ranks with the miniature.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _common import GIB, TINY, Report, clear_memory, relative_error, synchronize
from whole_job import diffusers_denoise, diffusers_models

from wanduet.config import EngineConfig
from wanduet.engine.job import Job, OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.engine.trace import overlap
from wanduet.media.latents import load_latents
from wanduet.parallel.launch import run_on_ranks
from wanduet.parallel.rank import Rank
from wanduet.request import GenerationRequest
from wanduet.specs import WAN_1_3B

SIZES = {"480p": (480, 832, 81), "720p": (720, 1280, 81)}
MODEL, DEVICES = "random:1.3b", ("cuda:0", "cuda:1")
if TINY:
    SIZES, MODEL, DEVICES = {"480p": (96, 96, 9)}, "miniature", ("cpu", "cpu")
PROMPT = "a red circle moving left on a black background"
RUNS = 3  # the first of which loads models and is not counted


class Bench:
    """What the sections share: options, and a folder for what they write."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder

    @contextmanager
    def engine(self, strategy: str, **settings: Any) -> Iterator[Engine]:
        """An engine of a strategy; `single` on the first device."""
        devices = DEVICES[:1] if strategy == "single" else DEVICES
        if strategy == "placed" and TINY:
            settings["devices"] = "vae=cpu,transformer=cpu"
        settings = {"devices": ",".join(devices), "strategy": strategy, "data_dir": self.folder} | settings
        with Engine(EngineConfig(model=MODEL, cache_embeddings=False, checkpoint_seconds=1e9, **settings)) as engine:
            yield engine

    def request(self, size: str, guidance: float, seed: int = 1, steps: int | None = None) -> GenerationRequest:
        """A job of a size."""
        height, width, frames = SIZES[size]
        return GenerationRequest(
            prompt=PROMPT, height=height, width=width, num_frames=frames, seed=seed, guidance_scale=guidance,
            num_inference_steps=steps or self.options.steps,
        )  # fmt: skip

    def run(
        self, engine: Engine, request: GenerationRequest, name: str, runs: int = RUNS
    ) -> tuple[Job, dict[str, float]]:
        """The last of `runs` equal jobs, and the median of each timing without the first."""
        timings = []
        for _ in range(runs):
            job = engine.submit(request, OutputOptions(self.folder / f"{name}.mp4", save_latents=True))
            timings.append(job.result().timings)
        counted = timings[1:] or timings
        return job, {key: statistics.median(t[key] for t in counted) for key in counted[0]}


def both(bench: Bench, report: Report, section: str, guidance: float, sizes: Sequence[str], **settings: Any) -> None:
    """Denoise and decode of one job on one device and on both."""
    for size in sizes:
        request, seconds = bench.request(size, guidance), {}
        for strategy in ("single", "parallel"):
            with bench.engine(strategy, **settings) as engine:
                job, timings = bench.run(engine, request, f"{section}-{size}-{strategy}")
                forwards = bench.options.steps * (2 if guidance > 1 else 1)
                layout = next((c.value for c in job.plan.choices if c.setting == "layout"), None)
                seconds[strategy] = timings
                report.add(
                    section, size=size, strategy=strategy, layout=layout, attention=job.attention,
                    denoise_s=round(timings["denoise_s"], 3), step_s=round(timings["denoise_s"] / bench.options.steps, 4),
                    forward_s=round(timings["denoise_s"] / forwards, 4), decode_s=round(timings["decode_s"], 3),
                    rungs=job.rungs,
                )  # fmt: skip
        ratios = {f"{phase}_ratio": round(seconds["single"][f"{phase}_s"] / seconds["parallel"][f"{phase}_s"], 3)
                  for phase in ("denoise", "decode")}  # fmt: skip
        report.add(f"{section} ratio", size=size, **ratios)


def guided(bench: Bench, report: Report) -> None:
    """A branch of the guidance on each device."""
    both(bench, report, "guided", 6.0, bench.options.sizes[:1])


def unguided(bench: Bench, report: Report) -> None:
    """One sequence over both devices, heads exchanged."""
    both(bench, report, "unguided", 1.0, bench.options.sizes)


def batch(bench: Bench, report: Report) -> None:
    """Eight short jobs, `placed`: what the whole batch takes beyond its denoises, first encode and last decode."""
    size = bench.options.sizes[0]
    with bench.engine("placed") as engine:
        bench.run(engine, bench.request(size, 6.0, steps=2), "warm", runs=1)
        began, first = time.perf_counter(), len(engine.trace.spans)
        requests = [bench.request(size, 6.0, seed) for seed in range(8)]
        jobs = [engine.submit(r, OutputOptions(bench.folder / f"batch-{r.seed}.mp4")) for r in requests]
        for job in jobs:
            job.result()
        total, spans = time.perf_counter() - began, engine.trace.spans[first:]
        peaks = {k: round(v / GIB, 3) for k, v in engine.models.peak_memory().items()}
    seconds = {stage: [s.end - s.begin for s in spans if s.stage == stage] for stage in ("encode", "denoise", "decode")}
    denoise = sum(seconds["denoise"])
    beyond = total - denoise - seconds["encode"][0] - seconds["decode"][-1]
    report.add(
        "batch", size=size, jobs=len(jobs), total_s=round(total, 3), denoise_s=round(denoise, 3),
        first_encode_s=round(seconds["encode"][0], 3), last_decode_s=round(seconds["decode"][-1], 3),
        decode_beside_denoise_s=round(overlap(spans, "decode", "denoise"), 3), overhead_percent=round(100 * beyond / denoise, 2),
    )  # fmt: skip
    report.add("batch memory", size=size, peak_gib=peaks)


def latents(bench: Bench, report: Report) -> None:
    """How far the latents of each strategy are from those of one device, same seed."""
    size, steps = bench.options.sizes[0], min(bench.options.steps, 8)
    for guidance in (6.0, 1.0):
        expected = None
        for strategy in ("single", "placed", "parallel"):
            with bench.engine(strategy) as engine:
                request = bench.request(size, guidance, steps=steps)
                job, _ = bench.run(engine, request, f"latents-{guidance}-{strategy}", runs=1)
                found, _ = load_latents(job.latents_path(0))
            expected = found if expected is None else expected
            report.add(
                "latents", size=size, steps=steps, guidance=guidance, strategy=strategy,
                bit_equal=torch.equal(found, expected), relative_difference=relative_error(found, expected),
            )  # fmt: skip


@torch.no_grad()
def diffusers(bench: Bench, report: Report) -> None:
    """diffusers' ways on the same machine: its models on a GPU each, one step after another; its Ulysses."""
    layers = 1 if TINY else 30
    for size in bench.options.sizes:
        transformer, _ = diffusers_models(torch.device(DEVICES[1]), layers)
        seconds = diffusers_denoise(transformer, SIZES[size], 3) / 3
        report.add("diffusers", way="VAE and transformer on a GPU each", size=size, step_s=round(seconds, 4))
        del transformer
        clear_memory()
    if TINY:  # diffusers' parallel code wants accelerators
        return
    sizes = {size: SIZES[size] for size in bench.options.sizes}
    for row in run_on_ranks(shared_forward, DEVICES, sizes, layers)[0]:
        report.add("diffusers", way="Ulysses", **row)


@torch.no_grad()
def shared_forward(rank: Rank, sizes: dict[str, tuple[int, int, int]], layers: int) -> list[dict[str, Any]]:
    """On every rank: seconds of one forward of diffusers' transformer over all of them."""
    from diffusers import ContextParallelConfig

    transformer, _ = diffusers_models(rank.device, layers)
    if rank.device.type == "cuda":
        transformer.set_attention_backend("_native_cudnn")
    transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=len(DEVICES)))
    rows = []
    for name, size in sizes.items():
        latents = torch.randn(1, *WAN_1_3B.latent_shape(*size), device=rank.device, dtype=torch.bfloat16)
        text = torch.randn(1, 512, 4096, device=rank.device, dtype=torch.bfloat16)
        step = torch.full((1,), 500, device=rank.device)
        seconds = []
        for _ in range(4):
            began = time.perf_counter()
            transformer(latents, step, text, return_dict=False)
            synchronize(rank.device)
            seconds.append(time.perf_counter() - began)
        rows.append({"size": name, "forward_s": round(statistics.median(seconds[1:]), 4)})
    return rows


SECTIONS = {"guided": guided, "unguided": unguided, "batch": batch, "latents": latents, "diffusers": diffusers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2 if TINY else 8)
    parser.add_argument("--sizes", type=lambda text: text.split(","), default=list(SIZES))
    parser.add_argument("sections", nargs="*", default=[], choices=(*SECTIONS, []))
    options = parser.parse_args()
    if not TINY and torch.cuda.device_count() < len(DEVICES):
        print(f"# nothing is measured: this machine has {torch.cuda.device_count()} GPUs (TINY=1 tries it on the CPU)")
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("WANDUET_DATA_DIR", folder)
        bench = Bench(options, Path(folder))
        report = Report("two_gpus")
        chosen = options.sections or list(SECTIONS)
        report.run({name: lambda r, f=SECTIONS[name]: f(bench, r) for name in SECTIONS}, chosen)
    report.print()


if __name__ == "__main__":
    main()
