"""Seconds between a video's last decoded frame and its finished file, with frames that arrive as a decode gives them.

    PYTHONPATH=src python benchmarks/video_tail.py [--size 480p] [--fps-decoded 60 0]

`--fps-decoded`: frames a second that arrive; 0: all at once, as after a decode in strips. Two kinds of frames: textures
that move, with an object before them and grain, like those of a trained model; and noise, as random weights give, which is
the encoder's worst case. The settings before (one encoder, preset medium, lookahead of 40 frames) stand beside. Half a
minute.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from _common import TINY, Report
from numpy.typing import NDArray

from wanduet.media import codecs
from wanduet.media.read import read_frames
from wanduet.media.video import VideoSpec, write_video

SIZES = {"480p": (480, 832), "720p": (720, 1280), "1080p": (1080, 1920)}
FRAMES = 9 if TINY else 81
Frames = NDArray[np.uint8]


def noise(height: int, width: int) -> Frames:
    return np.random.default_rng(0).integers(0, 256, (FRAMES, height, width, 3), np.uint8)


def moving(height: int, width: int) -> Frames:
    """Textures with the spectrum of photographs; the background pans, a disc crosses it, both ripple, with grain."""
    dice = torch.Generator().manual_seed(0)

    def texture(rows: int, columns: int) -> torch.Tensor:
        spectrum = torch.fft.rfft2(torch.randn(3, rows, columns, generator=dice))
        distance = torch.hypot(torch.fft.fftfreq(rows)[:, None] * rows, torch.fft.rfftfreq(columns) * columns).clamp(
            min=1
        )
        picture = torch.fft.irfft2(spectrum / distance**1.35, s=(rows, columns))
        picture = (picture - picture.mean()) / picture.std()
        return (picture.mean(0, keepdim=True) * 1.4 + picture * 0.35)[None] * 40 + 120

    def sample(picture: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        grid = torch.stack([2 * x / picture.shape[3] - 1, 2 * y / picture.shape[2] - 1], -1)[None]
        return torch.nn.functional.grid_sample(picture, grid, "bicubic", "reflection", False)[0]

    background, disc = texture(2 * height, 2 * width), texture(height, height)
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    frames = np.empty((FRAMES, height, width, 3), np.uint8)
    for i in range(FRAMES):
        part = i / FRAMES
        picture = sample(background, x + width * (0.2 + 0.2 * part) + torch.sin(y / 40 + 9 * part), y + height / 4)
        dx, dy = x - width * (0.3 + 0.4 * part), y - height / 2
        mask = torch.sigmoid((height * 0.27 - torch.hypot(dx, dy)) / 2)
        turn, centre = torch.tensor(part), height / 2
        over = sample(disc, centre + turn.cos() * dx - turn.sin() * dy, centre + turn.sin() * dx + turn.cos() * dy)
        grain = torch.randn(1, height, width, generator=dice) * 2.4
        picture = picture * (1 - mask) + over * mask + grain
        frames[i] = picture.clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
    return frames


def measure(report: Report, name: str, frames: Frames, rate: float, settings: str) -> None:
    last = 0.0

    def arriving() -> Iterator[Frames]:
        nonlocal last
        began = time.perf_counter()
        for i, frame in enumerate(frames):
            if rate and (left := began + i / rate - time.perf_counter()) > 0:
                time.sleep(left)
            last = time.perf_counter()
            yield frame

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        written = write_video(arriving(), Path(folder) / "a.mp4", VideoSpec(*frames.shape[1:3]))
        ended = time.perf_counter()
        error = np.mean(
            [np.mean((a - b.astype(np.float32)) ** 2) for a, b in zip(read_frames(written.path), frames, strict=True)]
        )
        report.add(f"{frames.shape[1]} rows", frames=name, settings=settings, arriving=rate or "at once",
                   tail_s=round(ended - last, 3), all_s=round(ended - began, 3), mb=round(written.num_bytes / 1e6, 2),
                   psnr_rgb=round(float(10 * np.log10(255**2 / error)), 2))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="480p")
    parser.add_argument("--fps-decoded", type=float, nargs="*", default=[60.0, 0.0])
    options = parser.parse_args()
    size = (64, 96) if TINY else SIZES[options.size]
    h264 = codecs.CODECS["h264"]
    before: Any = (
        ("preset", "medium"),
        *((name, value) for name, value in h264.options if name not in ("preset", "rc-lookahead")),
    )
    report = Report(f"video_tail_{options.size}")
    for make in (moving, noise):
        frames = make(*size)
        for rate in options.fps_decoded:
            measure(report, make.__name__, frames, rate, "now")
            with patch.dict(codecs.CODECS, h264=replace(h264, options=before, segments=False)):
                measure(report, make.__name__, frames, rate, "before")
    report.write()
    report.print()


if __name__ == "__main__":
    main()
