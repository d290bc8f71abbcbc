"""Whole jobs from prompt to MP4 at each speed, on one GPU or several: 1.3B in its true shapes, random weights, models loaded.

    PYTHONPATH=src python benchmarks/speeds.py [--devices cuda:0,cuda:1] [--size 480p] [--vae bfloat16] [row ...]

A job's seconds include a new prompt of 80 tokens, encoded by a UMT5 in its true shape (random weights; the negative prompt
is cached). EasyCache decides by what the model predicts, and random weights predict noise: rows take MagCache instead,
whose table leads to a known number of forwards, with a threshold that computes about as many as EasyCache does with
real weights. Each row runs twice; the second job counts.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import GIB, ON_GPU, TINY, Report, clear_memory
from whole_job import SIZES, Text

from wanduet.config import EngineConfig
from wanduet.engine.job import OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.request import GenerationRequest

DISTILLED: dict[str, Any] = {"sampler": "renoise", "timesteps": "1000,757,522", "guidance_scale": 1.0}
MODEL, SPARSE_MODEL = "random:1.3b", "random:1.3b-vsa"
# The model, and the fields of a request.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "exact": (MODEL, {}),
    "near": (MODEL, {"step_cache": "magcache:0.04"}),  # 58 of 100 forwards
    "fine": (MODEL, {"step_cache": "magcache:0.18"}),  # 40
    "draft": (MODEL, {"step_cache": "magcache:0.24", "guidance_gate": 0.3}),  # 28
    "draft, fewer": (MODEL, {"step_cache": "magcache:0.3", "guidance_gate": 0.12}),  # 24
    "3 steps": (MODEL, DISTILLED),
    "3 steps sparse": (MODEL, DISTILLED | {"sparse": 0.2}),
    "3 steps VSA": (SPARSE_MODEL, {}),
    "near, 8 bits": (MODEL, {"step_cache": "magcache:0.04", "quantize": "fp8"}),
    "fine, 8 bits": (MODEL, {"step_cache": "magcache:0.18", "quantize": "fp8"}),
    "draft, fewer, 8 bits": (MODEL, {"step_cache": "magcache:0.3", "guidance_gate": 0.12, "quantize": "fp8"}),
    "low resolution first": (MODEL, {"low_res_first": True, "sampler": "euler"}),  # from 720p on
}


def measure(report: Report, options: argparse.Namespace, model: str, rows: dict[str, dict[str, Any]]) -> None:
    """Run all rows of one model on one engine."""
    data = Path(tempfile.mkdtemp())
    clear_memory()
    config = EngineConfig(
        model=model, data_dir=data, devices=options.devices, vae_dtype=options.vae, checkpoint_seconds=1e9,
        text_encoder_device=options.text, text_encoder_hold="streamed" if TINY else "resident",
    )  # fmt: skip
    height, width, frames = SIZES[options.size]
    with Engine(config) as engine:
        options.made_text.install(engine.models.prompts, data / "embeddings")
        for name, fields in rows.items():
            for run in ("first", "again"):
                request = GenerationRequest(
                    prompt=options.made_text.prompt(), height=height, width=width, num_frames=frames, seed=1, **fields
                )
                if name == "exact" and (TINY or run == "first"):  # it only loads
                    request = request.model_copy(update={"num_inference_steps": 2})
                began = time.perf_counter()
                job = engine.submit(request, OutputOptions(data / "video.mp4"))
                result = job.result()
                seconds = time.perf_counter() - began
                plan = job.plan.as_dict()
                forwards = plan.get("predicted_forwards") or {}
                report.add(
                    options.size, row=name, run=run, devices=options.devices, vae=options.vae, seconds=round(seconds, 3),
                    **{k: round(v, 3) for k, v in result.timings.items()}, forwards=forwards.get("count"), of=forwards.get("of"),
                    attention=job.attention, kernels=job.videos[0].record.kernels, strategy=plan.get("strategy"), notes=job.notes,
                    peak_gib={k: round(v / GIB, 3) for k, v in result.peak_memory_bytes.items()},
                    predicted_gib={d.name: round(d.peak / GIB, 3) for d in job.plan.prediction.devices},
                    text=f"{job.plan.text.device} {job.plan.text.residency} {job.plan.text.dtype}",
                )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", default="cuda:0" if ON_GPU else "cpu")
    parser.add_argument("--size", choices=tuple(SIZES), default="480p")
    parser.add_argument("--vae", default="float32")
    parser.add_argument("--text", default="cuda:0" if ON_GPU else "cpu")
    parser.add_argument("rows", nargs="*", default=[], choices=(*ROWS, []))
    options = parser.parse_args()
    if TINY:
        SIZES[options.size] = (64, 64, 17)
    chosen = options.rows or [row for row in ROWS if row != "low resolution first" or options.size != "480p"]
    os.environ.setdefault("WANDUET_DATA_DIR", tempfile.mkdtemp())
    count = len(options.devices.split(","))
    report = Report(
        "_".join(
            [
                "speeds",
                options.size,
                *(["bfloat16"] if options.vae == "bfloat16" else []),
                *([f"{count}_gpus"] if count > 1 else []),
            ]
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        options.made_text = Text(Path(folder) / "text")
        for model in dict.fromkeys(ROWS[row][0] for row in chosen):
            rows = {row: fields for row, (of, fields) in ROWS.items() if of == model and row in chosen}
            if TINY:  # caches want more steps
                rows = {row: fields for row, fields in rows.items() if "step_cache" not in fields}
            report.run({model: lambda r, m=model, rows=rows: measure(r, options, m, rows)}, [model])
    report.print()


if __name__ == "__main__":
    main()
