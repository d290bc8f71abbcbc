"""The video taking shape: after denoising steps, the clean video foreseen so far as a small moving picture.

Two results of steps in a row lie on a line from noise to video; where that line ends without noise is what
the model foresees. A linear map from latents to colours turns it into a picture that costs next to nothing.
The map is learned from videos that were finished, whose latents and frames are both known.
"""

import io
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from wanduet.jobs.preview_maps import BUILT_IN
from wanduet.media.codecs import Frame
from wanduet.media.files import write_atomically
from wanduet.media.preview import SPATIAL_STRIDE, TEMPORAL_STRIDE, LatentToRGB, resize
from wanduet.media.read import probe, read_frames
from wanduet.request import GenerationRequest

log = structlog.get_logger(__name__)

LONGEST_SIDE = 160  # of a preview, in pixels
MOST_FRAMES = 24
SHARE = 0.02  # of the time of a denoise that previews may take
SHORTEST_PAUSE = 0.5  # seconds between two previews
VIDEOS_TO_LEARN = 8  # more would change the map no more
_RIDGE = 1e-4  # keeps the map small where the finished videos show few colours


class Step(Protocol):
    """What a preview needs of `wanduet.sampling.denoise.StepInfo`."""

    step: int
    num_steps: int
    sigma: float
    latents: Tensor


class ColourMaps:
    """The maps from latents to colours, one a model: built in, or learned and kept in a folder."""

    def __init__(self, folder: Path, model: str, channels: int) -> None:
        self._path = folder / f"{''.join(c if c.isalnum() else '-' for c in model)[-80:]}.json"
        self._model = model
        self._channels = channels

    def load(self) -> LatentToRGB | None:
        """The model's map; None until a first video was finished."""
        if (built_in := BUILT_IN.get(self._model)) is not None:
            return LatentToRGB(torch.tensor(built_in[:-1]), torch.tensor(built_in[-1]))
        sums = self._read()
        if sums["videos"] == 0:
            return None
        gram, target = np.array(sums["gram"]), np.array(sums["target"])
        ridge = _RIDGE * gram[-1, -1] * np.eye(len(gram))
        ridge[-1, -1] = 0.0  # the mean colour stays
        solution = torch.from_numpy(np.linalg.solve(gram + ridge, target)).float()
        return LatentToRGB(solution[:-1], solution[-1])

    def learn(self, latents: Tensor, video: Path) -> None:
        """Take a finished video `[C, T, h, w]` into the map; nothing once enough of them were seen."""
        sums = self._read()
        if self._model in BUILT_IN or sums["videos"] >= VIDEOS_TO_LEARN:
            return
        gram, target = normal_equations(latents, small_frames(video))
        sums = {
            "videos": sums["videos"] + 1,
            "gram": (np.array(sums["gram"]) + gram).tolist(),
            "target": (np.array(sums["target"]) + target).tolist(),
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, json.dumps(sums).encode())

    def _read(self) -> dict[str, Any]:
        size = self._channels + 1
        empty = {"videos": 0, "gram": np.zeros((size, size)), "target": np.zeros((size, 3))}
        try:
            sums = json.loads(self._path.read_bytes())
            whole = np.shape(sums["gram"]) == (size, size) and np.shape(sums["target"]) == (size, 3)
            return sums if whole and isinstance(sums["videos"], int) else empty
        except (OSError, ValueError, KeyError, TypeError):
            return empty


class Previews:
    """The previews of one job's denoise: give it to the engine as `on_step`. Never raises, never changes latents."""

    def __init__(self, path: Path, maps: ColourMaps, request: GenerationRequest) -> None:
        self._path = path
        self._maps = maps
        self._fps = max(1.0, (request.fps or 16) / TEMPORAL_STRIDE)
        self._single = request.num_videos_per_prompt == 1
        self._colours = maps.load()
        self._seen: tuple[Step, ...] = ()  # the last two steps
        self._last: Tensor | None = None  # the finished latents
        self._next = 0.0

    def __call__(self, info: Step) -> None:
        """After a step: a new picture, if it is time for one."""
        try:
            self._see(info)
        except Exception as error:  # a picture is not worth a job
            log.warning("no preview", error=type(error).__name__)

    def learn(self, video: Path) -> None:
        """After the job: remember what its latents looked like."""
        last, self._last = self._last, None
        try:
            if last is not None and self._single:
                self._maps.learn(last[0].float().cpu(), video)
        except Exception as error:
            log.warning("nothing learned for previews", error=type(error).__name__)

    def _see(self, info: Step) -> None:
        seen, self._seen = self._seen, (*self._seen[-1:], info)
        last = info.step + 1 == info.num_steps
        if last:
            self._last, self._seen = info.latents, ()
        if self._colours is None or (time.perf_counter() < self._next and not last):
            return
        foreseen = info.latents if last else foresee(seen, info.sigma)
        if foreseen is None:
            return
        began = time.perf_counter()
        self._write(moving_picture(self._colours(foreseen[0]), self._fps))
        now = time.perf_counter()
        self._next = now + max(SHORTEST_PAUSE, (now - began) / SHARE)

    def _write(self, picture: bytes) -> None:
        """Replace the picture whole; it need not survive a power cut."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_bytes(picture)
        os.replace(partial, self._path)


def foresee(seen: Sequence[Step], sigma: float) -> Tensor | None:
    """The clean latents that two results of steps in a row point at; None where there are not two.

    `sigma` is the noise that the newer of them still holds. It is exact for Euler's steps, where each result
    lies on the line from the one before to the model's prediction of the end.
    """
    if len(seen) < 2 or seen[1].step != seen[0].step + 1:
        return None
    older, newer = seen
    slope = (newer.latents - older.latents) / (sigma - newer.sigma)
    return newer.latents - sigma * slope


def moving_picture(frames: Frame, fps: float) -> bytes:
    """Frames `[T, h, w, 3]` as an animated WebP."""
    step = -(-len(frames) // MOST_FRAMES)
    pictures = [Image.fromarray(resize(frame, LONGEST_SIDE)) for frame in frames[::step]]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, "WEBP", save_all=True, append_images=pictures[1:], duration=round(1000 * step / fps), loop=0, quality=70
    )
    return buffer.getvalue()


def small_frames(video: Path) -> NDArray[np.float32]:
    """A video averaged down to its latents' grid: `[T, h, w, 3]` in 0 to 1, read frame by frame."""
    about = probe(video)
    height, width = about["height"] // SPATIAL_STRIDE, about["width"] // SPATIAL_STRIDE
    groups = (int(about["num_frames"]) - 1) // TEMPORAL_STRIDE + 1
    found = np.zeros((groups, height, width, 3), np.float32)
    for index, frame in enumerate(read_frames(video)):
        cut = frame[: height * SPATIAL_STRIDE, : width * SPATIAL_STRIDE].astype(np.float32)
        small = cut.reshape(height, SPATIAL_STRIDE, width, SPATIAL_STRIDE, 3).mean((1, 3)) / 255
        found[-(-index // TEMPORAL_STRIDE)] += small if index == 0 else small / TEMPORAL_STRIDE
    return found


def normal_equations(latents: Tensor, colours: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`XᵀX [C+1, C+1]` and `XᵀY [C+1, 3]` of one video, each pixel's weight such that every video counts the same."""
    rows, columns = colours.shape[1:3]  # a cropped video has fewer rows than its latents
    x = latents[:, :, :rows, :columns].double().flatten(1).T.numpy()
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    y = colours.reshape(-1, 3).astype(np.float64)
    return x.T @ x / len(x), x.T @ y / len(x)
