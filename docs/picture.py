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
SHOT_MS = 160  # a picture of the page is seen
WORK_MS = 500  # between two pictures while the video is made
PAUSE_MS = 1200  # to read what has appeared
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
    """Type a prompt, read the plan, press the button, and take pictures of the page until the video has played."""
    from playwright.sync_api import sync_playwright

    film = Film()
    with _served() as url, sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport=WINDOW)
        page.set_default_timeout(180_000)
        page.goto(url)
        page.locator("#top").get_by_text("· ready").wait_for()
        page.locator("#plan:not(.waiting) .message").wait_for()
        film.take(page, PAUSE_MS)
        prompt, button = page.get_by_label("Prompt", exact=True), page.get_by_role("button", name="Generate")
        for end in range(4, len(PAGE_PROMPT) + 4, 4):
            prompt.fill(PAGE_PROMPT[:end])
            film.take(page)
        page.get_by_role("radio", name="Draft").check()
        page.locator("#plan:not(.waiting)", has_text="speed draft").wait_for()
        film.take(page, PAUSE_MS)
        button.hover()
        film.take(page)
        button.click()
        player = page.locator("#player")
        while not player.count():
            film.take(page)
            page.wait_for_timeout(WORK_MS)
        while player.evaluate("video => video.readyState < 4"):
            page.wait_for_timeout(SHOT_MS)
        _film_video(film, page, player)
        browser.close()
    _save("page.webp", film.pictures, film.milliseconds)


def _film_video(film: "Film", page: Any, player: Any) -> None:
    """Take the video at even moments, whatever time a picture of the page takes on this machine."""
    player.evaluate("video => { video.pause(); video.controls = false; }")  # as they hide in play
    seconds = player.evaluate("video => video.duration")
    for moment in np.arange(0, seconds, SHOT_MS / 1000):
        player.evaluate(
            "(video, moment) => new Promise(seen => { video.onseeked = seen; video.currentTime = moment; })", moment
        )
        film.take(page)
    film.take(page, PAUSE_MS)


class Film:
    """Pictures of the page, each with its time on the screen; what does not change is one picture that stays longer."""

    def __init__(self) -> None:
        self.pictures: list[Image.Image] = []
        self.milliseconds: list[int] = []

    def take(self, page: Any, milliseconds: int = SHOT_MS) -> None:
        """Add a picture of the page as it is now."""
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        size = (PAGE_WIDTH, picture.height * PAGE_WIDTH // picture.width)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
        if self.pictures and picture.tobytes() == self.pictures[-1].tobytes():
            self.milliseconds[-1] += milliseconds
            return
        self.pictures.append(picture)
        self.milliseconds.append(milliseconds)


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


def _save(name: str, pictures: list[Image.Image], milliseconds: int | list[int] = MILLISECONDS) -> None:
    began = time.perf_counter()
    first, *rest = pictures
    options = {"duration": milliseconds, "loop": 0, "quality": 80, "method": 4, "minimize_size": True}
    first.save(IMAGES / name, save_all=True, append_images=rest, **options)
    size = (IMAGES / name).stat().st_size
    print(f"{name}: {len(pictures)} pictures, {size / 1024:.0f} KiB, written in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["videos", "page"]
    if "videos" in wanted:
        film_of_videos()
    if "page" in wanted:
        film_of_page()
