"""What speeds, step caches and the guidance gate cost on the miniature: forwards, and the loss against its own exact videos.

    PYTHONPATH=src python benchmarks/step_caches.py [--steps 50] [--prompts 4]

It shows the order of the rules, not their loss on a large model. The miniature has no published constants. MagCache's and
TeaCache's are calibrated here by an exact run of another prompt: ratios of `velocity - latents`, which is what is reused,
and a polynomial from the change of the time embedding to that of the velocity.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from _common import TINY, Report, relative_error
from torch import Tensor

from wanduet import Engine, EngineConfig, GenerationRequest, OutputOptions
from wanduet.family import step_caches
from wanduet.family.speeds import SPEEDS
from wanduet.family.step_caches import StepCacheTable
from wanduet.media.latents import load_latents
from wanduet.media.read import read_frames
from wanduet.models.dit.model import WanTransformer

PROMPTS = (
    "a red circle moving left on a black background",
    "a blue star spinning on a gray background",
    "a green square growing on a black background",
    "a purple heart bouncing on a white background",
)
CALIBRATION = "a white square moving right on a blue background"
SHIFT = 3.0
SIZE = {"height": 64, "width": 64, "num_frames": 17}
ROWS: tuple[dict[str, Any], ...] = (
    *({"speed": speed.name} | dict(speed.fields) for speed in SPEEDS[1:]),
    *({"step_cache": f"magcache:{threshold}"} for threshold in (0.04, 0.12, 0.24)),
    *({"step_cache": f"teacache:{threshold}"} for threshold in (0.05, 0.1, 0.2)),
    {"guidance_gate": 0.5},
    {"guidance_gate": 0.7},
    {"step_cache": "easycache:0.05", "guidance_gate": 0.7},
)


@dataclass(frozen=True)
class Made:
    """A finished video: latents `[16, T, h, w]`, frames `[T, H, W, 3]`, forwards."""

    latents: Tensor
    frames: np.ndarray
    forwards: int | None


def make(engine: Engine, folder: str, **fields: Any) -> Made:
    """Run one job."""
    output = OutputOptions(Path(folder) / "a.mkv", "ffv1", save_latents=True)
    video = engine.submit(GenerationRequest(seed=7, flow_shift=SHIFT, **SIZE, **fields), output).result().videos[0]
    frames = np.stack(list(read_frames(video.path))).astype(np.float64)
    return Made(load_latents(video.latents_path)[0], frames, video.provenance.get("forwards"))


@contextmanager
def recorded(calls: list[tuple[Tensor, Tensor, Tensor]]) -> Iterator[None]:
    """Record latents, the prompt's velocity and the time embedding of each forward."""
    whole = WanTransformer.forward_cfg

    def forward(self: WanTransformer, latents: Tensor, timestep: Tensor, *given: Any) -> Any:
        velocities = whole(self, latents, timestep, *given)
        if not latents.is_meta:  # else the planner counts bytes
            calls.append((latents, velocities[0], self.condition_embedder.embed_time(timestep)[0][0]))
        return velocities

    WanTransformer.forward_cfg = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        WanTransformer.forward_cfg = whole  # type: ignore[method-assign]


def calibrate(engine: Engine, folder: str) -> StepCacheTable:
    """The miniature's constants, from one exact run."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    make(engine, folder, prompt=CALIBRATION, num_inference_steps=1)  # the self-test of the weights has its own forwards
    with recorded(calls):
        make(engine, folder, prompt=CALIBRATION, num_inference_steps=50, sampler="unipc-official")
    assert len(calls) == 50
    sizes = [(velocity - latents).norm(dim=1) for latents, velocity, _ in calls]
    ratios = [1.0, *(float((after / before).mean()) for before, after in pairwise(sizes))]
    changes = [
        [float((after[kind] - before[kind]).abs().mean() / before[kind].abs().mean()) for kind in (2, 1)]
        for before, after in pairwise(calls)
    ]
    coefficients = np.polyfit(*np.array(changes).T, 4)
    return StepCacheTable(SHIFT, tuple(ratios), tuple(map(float, coefficients)), 0.1, ((0.0, 1.0), (0.1, 0.5)))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """In dB, of 8-bit frames; at most 100."""
    return min(100.0, float(10 * np.log10(255**2 / max(1e-9, np.square(one - other).mean()))))


def measure(report: Report, engine: Engine, folder: str, prompts: Sequence[str], steps: int) -> None:
    """All rows, each against the exact video of the same prompt and seed: median and worst over the prompts."""
    exact = [make(engine, folder, prompt=prompt, num_inference_steps=steps) for prompt in prompts]
    for row in ({"num_inference_steps": steps // 2}, *ROWS):
        row = {"num_inference_steps": steps} | row
        made = [make(engine, folder, prompt=prompt, **row) for prompt in prompts]
        errors = [relative_error(one.latents, other.latents) for one, other in zip(made, exact, strict=True)]
        ratios = [psnr(one.frames, other.frames) for one, other in zip(made, exact, strict=True)]
        report.add(
            "miniature",
            **row,
            forwards=statistics.median(one.forwards or 2 * row["num_inference_steps"] for one in made),
            of=2 * steps,
            latents_error_median=round(statistics.median(errors), 5),
            latents_error_worst=round(max(errors), 5),
            psnr_median=round(statistics.median(ratios), 2),
            psnr_worst=round(min(ratios), 2),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=14 if TINY else 50)
    parser.add_argument("--prompts", type=int, default=1 if TINY else 4)
    options = parser.parse_args()
    report = Report("step_caches_miniature")
    with tempfile.TemporaryDirectory() as folder, Engine(EngineConfig(model="miniature", devices="cpu")) as engine:
        shape = engine.models.spec.transformer
        step_caches.TABLES = {(shape.num_layers, shape.dim): calibrate(engine, folder)}
        measure(report, engine, folder, PROMPTS[: options.prompts], options.steps)
    report.write()
    report.print()


if __name__ == "__main__":
    main()
