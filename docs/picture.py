"""Writes docs/images/film.webp: six videos that the miniature made, side by side, as a film that repeats."""

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
BORDER, SCALE = 3, 2
MILLISECONDS = 62  # a frame, at 16 a second


def main() -> None:
    """Make the videos, and put the frames of one moment into one picture."""
    with tempfile.TemporaryDirectory() as folder, Engine(EngineConfig(model="miniature")) as engine:
        jobs = [
            engine.submit(GenerationRequest(prompt=prompt, seed=4), OutputOptions(Path(folder) / f"{number}.mp4"))
            for number, prompt in enumerate(PROMPTS)
        ]
        videos = [np.stack(list(read_frames(job.result().videos[0].path))) for job in jobs]  # [T, H, W, 3]
    film = np.concatenate([np.pad(video, _edges(), constant_values=255) for video in videos], axis=2)
    pictures = [Image.fromarray(frame) for frame in film.repeat(SCALE, axis=1).repeat(SCALE, axis=2)]
    path = Path(__file__).with_name("images") / "film.webp"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=MILLISECONDS, loop=0, quality=80)


def _edges() -> tuple[tuple[int, int], ...]:
    return ((0, 0), (BORDER, BORDER), (BORDER, BORDER), (0, 0))


if __name__ == "__main__":
    main()
