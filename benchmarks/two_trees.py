"""The same jobs by this tree and by an earlier one: latents and frames bit for bit, seconds, peaks and their predictions.

    PYTHONPATH=src python benchmarks/two_trees.py --earlier OTHER/src [--sizes 480p] [--steps 12] [--devices cuda:0 ...]

Trees take turns (earlier, this, earlier, this), each time in a process of its own, which makes one job that is not counted
and `--jobs` that are. A row compares the medians over all turns. The first turn of each compiles and measures kernels; both
trees keep what they remember of them in folders of their own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from _common import TINY, Report

SIZES = {"480p": (480, 832, 81), "720p": (720, 1280, 81), "1080p": (1088, 1920, 81)}
MODEL, DEVICES = "random:1.3b", ["cuda:0"]
if TINY:
    SIZES, MODEL, DEVICES = {"480p": (96, 96, 9)}, "miniature", ["cpu"]


def turn(
    source: Path, folder: Path, size: str, options: argparse.Namespace, devices: str,
    config: Mapping[str, Any] = {}, request: Mapping[str, Any] = {},
) -> list[dict[str, Any]]:  # fmt: skip
    """One process of a tree: its counted jobs. `config`, `request`: more settings of the engine, fields of the request."""
    height, width, frames = SIZES[size]
    settings = {
        "folder": str(folder), "config": {"model": MODEL, "devices": devices} | dict(config),
        "request": {"height": height, "width": width, "num_frames": frames} | dict(request),
        "steps": options.steps, "jobs": options.jobs,
    }  # fmt: skip
    command = [sys.executable, str(Path(__file__).with_name("_one_tree.py")), json.dumps(settings)]
    rest = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and not part.endswith("src")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(source), *rest])}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


def compare(report: Report, size: str, devices: str, options: argparse.Namespace, folder: Path) -> None:
    """Both trees' jobs of one size on some devices."""
    sources = {"earlier": options.earlier.resolve(), "this": Path(__file__).resolve().parents[1] / "src"}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in sources}
    for _ in range(options.turns):
        for name, source in sources.items():
            data = folder / name
            data.mkdir(exist_ok=True)
            rows[name] += turn(source, data, size, options, devices, {"vram_limit": options.vram_limit})
    seconds = {
        name: {key: statistics.median(row["timings"].get(f"{key}_s", 0.0) for row in of) for key in ("denoise", "decode", "total")}
        for name, of in rows.items()
    }  # fmt: skip
    ours = rows["this"]
    report.add(
        "two_trees", size=size, devices=devices, strategy=ours[0]["strategy"], attention=ours[0]["attention"],
        equal_latents=len({row["latents"] for of in rows.values() for row in of}) == 1,
        equal_frames=len({row["frames"] for of in rows.values() for row in of}) == 1,
        **{f"{key}_s": [round(seconds[name][key], 4) for name in sources] for key in ("denoise", "decode", "total")},
        denoise_ratio=round(seconds["this"]["denoise"] / seconds["earlier"]["denoise"], 4) if seconds["earlier"]["denoise"] else None,
        warnings=sorted({text for row in ours for text in row["warnings"]}),
        predicted_s=ours[-1]["predicted_seconds"],
        predicted_over_measured={
            device: round(ours[-1]["predicted"][device] / most, 3)
            for device, most in ((d, max(row["measured"].get(d, 0) for row in ours)) for d in ours[-1]["predicted"]) if most
        },
        peaks_gib={name: {d: round(b / 2**30, 3) for d, b in of[-1]["measured"].items()} for name, of in rows.items()},
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--earlier", type=Path, help="the other tree's folder `src`")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES)[:1], choices=tuple(SIZES))
    parser.add_argument("--devices", nargs="*", default=DEVICES, help="each is one row: cuda:0, or cuda:0,cuda:1")
    parser.add_argument("--steps", type=int, default=2 if TINY else 12)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--turns", type=int, default=1 if TINY else 2)
    parser.add_argument("--vram-limit", help="as the command line's, so that a smaller card's plan is taken")
    options = parser.parse_args()
    if options.earlier is None:
        if not TINY:  # `make bench` runs each file without arguments on a CPU
            parser.error("--earlier is required")
        options.earlier = Path(__file__).resolve().parents[1] / "src"
    report = Report("two_trees")
    with tempfile.TemporaryDirectory() as name:
        chosen = {
            f"{size} on {devices}": partial(compare, size=size, devices=devices, options=options, folder=Path(name))
            for size in options.sizes
            for devices in options.devices
        }
        report.run(chosen, list(chosen))
    report.print()


if __name__ == "__main__":
    main()
