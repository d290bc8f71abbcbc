"""A whole job in its variants: weight formats, step caches, the guidance gate, an input video: seconds, peaks, predictions.

    PYTHONPATH=src python benchmarks/variants.py [--size 480p] [--steps 50] [variant ...]

Each variant runs in a process of its own, which makes one job that is not counted and one that is. `predicted_s` and
`peak_ratio` (predicted / measured) come from the job's plan. Weights are random: seconds and memory do not depend on them,
except for EasyCache, which skips by what it sees.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from _common import TINY, Report
from two_trees import DEVICES, SIZES, turn

THIS = Path(__file__).resolve().parents[1] / "src"
# Name: settings of the engine, fields of the request.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "exact": ({}, {}),
    "fp8 weights": ({"weights": "fp8"}, {}),
    "q8 weights": ({"weights": "q8"}, {}),
    "easycache": ({}, {"step_cache": "easycache"}),
    "magcache": ({}, {"step_cache": "magcache"}),
    "teacache": ({}, {"step_cache": "teacache"}),
    "gate 0.5": ({}, {"guidance_gate": 0.5}),
    "input video": ({}, {"input_video": None, "strength": 0.8}),
    "input video, 8 GiB": ({"vram_limit": 8 * 2**30}, {"input_video": None, "strength": 0.8}),
}
if TINY:
    VARIANTS = {name: VARIANTS[name] for name in ("exact", "q8 weights", "easycache", "input video")}


def write_clip(path: Path, size: tuple[int, int, int]) -> None:
    """A video of moving noise."""
    height, width, frames = size
    draw = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=16)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        still = draw.integers(0, 255, (height, width, 3), dtype=np.uint8)
        for index in range(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.roll(still, index, 1)), "rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def run(report: Report, name: str, folder: Path, options: argparse.Namespace) -> None:
    config, request = VARIANTS[name]
    if "input_video" in request:
        clip = folder / "clip.mp4"
        if not clip.exists():
            write_clip(clip, SIZES[options.size])
        request = request | {"input_video": str(clip)}
    data = folder / "data"
    data.mkdir(exist_ok=True)
    job = turn(THIS, data, options.size, options, options.devices, config, request)[-1]
    peaks = {device: value for device, value in job["measured"].items() if value and device in job["predicted"]}
    report.add(
        "variants", variant=name, size=options.size, steps=options.steps, devices=options.devices, attention=job["attention"],
        **{key: round(value, 3) for key, value in job["timings"].items()}, predicted_s=job["predicted_seconds"],
        peak_gib={device: round(value / 2**30, 3) for device, value in peaks.items()},
        peak_ratio={device: round(job["predicted"][device] / value, 3) for device, value in peaks.items()},
        warnings=job["warnings"],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default=next(iter(SIZES)))
    parser.add_argument("--steps", type=int, default=12 if TINY else 50)
    parser.add_argument("--devices", default=DEVICES[0])
    parser.add_argument("variants", nargs="*", default=[], choices=(*VARIANTS, []))
    options = parser.parse_args()
    options.jobs = 1
    report = Report("variants")
    with tempfile.TemporaryDirectory() as name:
        chosen = {variant: partial(run, name=variant, folder=Path(name), options=options) for variant in VARIANTS}
        report.run(chosen, options.variants or list(VARIANTS))
    report.print()


if __name__ == "__main__":
    main()
