"""Writes docs/frames.png: frames of videos that the miniature made, one row a prompt."""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from wanduet import Engine, EngineConfig, GenerationRequest, OutputOptions
from wanduet.media.read import read_frames

PROMPTS = (
    "a red circle moving left on a beige background",
    "a yellow triangle growing on a black background",
    "a green square moving up on a navy background",
    "sunrise over the sea",
    "fireworks over a city",
    "a rocket flying to the stars",
)
FRAMES = (0, 6, 13, 19, 26, 32)


def main() -> None:
    """Make the videos, take frames of each, put them in rows."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, Engine(EngineConfig(model="miniature")) as engine:
        jobs = [
            engine.submit(GenerationRequest(prompt=p, seed=4), OutputOptions(Path(folder) / f"{i}.mp4"))
            for i, p in enumerate(PROMPTS)
        ]
        for job in jobs:
            frames = list(read_frames(job.result().videos[0].path))
            rows.append(
                np.concatenate([np.pad(frames[i], ((3, 3), (3, 3), (0, 0)), constant_values=255) for i in FRAMES], 1)
            )
    Image.fromarray(np.concatenate(rows)).save(Path(__file__).with_name("frames.png"))


if __name__ == "__main__":
    main()
