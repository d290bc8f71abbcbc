"""Measure the miniature through the engine: `python -m tools.miniature.evaluate`.

Each prompt is of a combination that is not in the training data. The engine makes an MP4 at the default settings, and
the detector classifies its frames.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tools.miniature.detector import ATTRIBUTES, Seen, detect
from tools.miniature.prompts import Described, describe
from tools.miniature.world import held_out_combinations, ring_combinations
from wanduet.config import EngineConfig
from wanduet.engine.job import OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.loras import Lora
from wanduet.media.read import read_frames
from wanduet.request import GenerationRequest


def evaluate(engine: Engine, count: int, seed: int, lora: str | None = None) -> dict[str, Any]:
    """The fraction of correct attributes over the first `count` held-out combinations; those of rings with `lora`, which
    learnt them."""
    combinations = held_out_combinations() if lora is None else ring_combinations()
    right = dict.fromkeys(ATTRIBUTES, 0)
    mistakes = []
    total = 0
    for want, seen in look(engine, [describe(c) for c in combinations[:count].tolist()], seed, lora):
        wrong = [name for name in ATTRIBUTES if getattr(seen, name) != getattr(want, name)]
        for name in ATTRIBUTES:
            right[name] += name not in wrong
        if wrong:
            mistakes.append({"prompt": want.prompt, "wrong": {name: getattr(seen, name) for name in wrong}})
        total += 1
    shares = {name: round(right[name] / total, 4) for name in ATTRIBUTES}
    return {
        "prompts": total,
        "seed": seed,
        "attributes_right": round(sum(right.values()) / (total * len(ATTRIBUTES)), 4),
        **shares,
        "mistakes": mistakes,
    }


def look(
    engine: Engine, wanted: list[Described], seed: int, lora: str | None = None
) -> Iterator[tuple[Described, Seen]]:
    """The detected attributes in each prompt's video; the next job runs meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for index, want in enumerate(wanted):
            request = GenerationRequest(
                prompt=want.prompt, seed=seed + index, loras=(Lora(name=lora),) if lora else None
            )
            jobs.append((want, engine.submit(request, OutputOptions(Path(folder) / f"{index}.mp4"))))
        for want, job in jobs:
            path = job.result().videos[0].path
            yield want, detect(np.stack(list(read_frames(path))))
            path.unlink()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=210)
    parser.add_argument("--seed", type=int, default=5000)
    parser.add_argument("--model", default="miniature")
    parser.add_argument("--lora", default=None, help="miniature-ring, or another that learnt rings")
    parser.add_argument("--devices", default=None)
    parser.add_argument("--out", type=Path, default=None, help="also write the result to this file")
    options = parser.parse_args()
    with Engine(EngineConfig(model=options.model, devices=options.devices)) as engine:
        text = json.dumps(evaluate(engine, options.count, options.seed, options.lora), indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
