"""Writes the two films of README, both made by the bundled miniature: docs/images/film.webp, six videos side by side, and
docs/images/page.webp, the page from the prompt to the video. The second needs Chromium, as tests of the page do.

    python docs/picture.py [videos] [page]
"""

import io
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wanduet import Engine, EngineConfig, GenerationRequest, OutputOptions
from wanduet.media.read import read_frames

IMAGES = Path(__file__).with_name("images")
PROMPTS = (
    "a red circle moving left on a beige background",
    "a white star spinning on a black background",
    "a green square moving up on a navy background",
    "sunrise over the sea",
    "fireworks over a city",
    "a rocket flying to the stars",
)
BORDER, SCALE = 3, 2
MILLISECONDS = 62  # a frame, at 16 a second

PAGE_PROMPT = "a red square spinning on a black background"
WINDOW = {"width": 1180, "height": 860}
SHOT_MS = 200  # between two pictures of the page
LAST_SHOTS = 12  # while the video plays
PAGE_WIDTH = 885


def film_of_videos() -> None:
    """Make the videos, and put the frames of one moment into one picture."""
    with tempfile.TemporaryDirectory() as folder, Engine(EngineConfig(model="miniature")) as engine:
        jobs = [
            engine.submit(GenerationRequest(prompt=prompt, seed=4), OutputOptions(Path(folder) / f"{number}.mp4"))
            for number, prompt in enumerate(PROMPTS)
        ]
        videos = [np.stack(list(read_frames(job.result().videos[0].path))) for job in jobs]  # [T, H, W, 3]
    film = np.concatenate([np.pad(video, _edges(), constant_values=255) for video in videos], axis=2)
    _save("film.webp", [Image.fromarray(frame) for frame in film.repeat(SCALE, axis=1).repeat(SCALE, axis=2)])


def _edges() -> tuple[tuple[int, int], ...]:
    return ((0, 0), (BORDER, BORDER), (BORDER, BORDER), (0, 0))


def film_of_page() -> None:
    """Type a prompt, press the button, and take a picture of the page five times a second until the video has played."""
    from playwright.sync_api import sync_playwright

    pictures: list[Image.Image] = []
    with _served() as url, sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport=WINDOW)
        page.set_default_timeout(180_000)
        page.goto(url)
        page.locator("#top").get_by_text("· ready").wait_for()
        prompt = page.get_by_label("Prompt", exact=True)
        for end in range(0, len(PAGE_PROMPT) + 1, 4):
            prompt.fill(PAGE_PROMPT[:end])
            pictures.append(_shot(page))
        prompt.fill(PAGE_PROMPT)
        page.get_by_text("All settings").wait_for()
        page.get_by_role("button", name="Generate").click()
        while not page.locator("#player").count():
            pictures.append(_shot(page))
            page.wait_for_timeout(SHOT_MS)
        while not page.evaluate("document.querySelector('#player').readyState >= 2"):
            page.wait_for_timeout(SHOT_MS)
        for _ in range(LAST_SHOTS):
            pictures.append(_shot(page))
            page.wait_for_timeout(SHOT_MS)
        browser.close()
    _save("page.webp", pictures, SHOT_MS)


@contextmanager
def _served() -> Iterator[str]:
    """A server of the miniature with an empty data folder; its address."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "wanduet",
            "serve",
            "--model",
            "miniature",
            "--port",
            "0",
            "--data-dir",
            folder,
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    if found := re.search(r"http://[\w.:]+", line):
                        yield found[0]
                        break
            finally:
                process.terminate()
                process.communicate()


def _shot(page: Any) -> Image.Image:
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    return picture.resize((PAGE_WIDTH, picture.height * PAGE_WIDTH // picture.width), Image.Resampling.LANCZOS)


def _save(name: str, pictures: list[Image.Image], milliseconds: int = MILLISECONDS) -> None:
    began = time.perf_counter()
    first, *rest = pictures
    first.save(IMAGES / name, save_all=True, append_images=rest, duration=milliseconds, loop=0, quality=80, method=4)
    size = (IMAGES / name).stat().st_size
    print(f"{name}: {len(pictures)} pictures, {size / 1024:.0f} KiB, written in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["videos", "page"]
    if "videos" in wanted:
        film_of_videos()
    if "page" in wanted:
        film_of_page()
