"""Linear maps from latents to colours, one a model: known beforehand, or found out on this machine.

Where a model's map is not known, it is fitted to the model's own encoder on made-up pictures, once, beside the
first job; the first finished videos, whose latents and frames are both known, then improve it.
"""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from wanduet.media.files import write_atomically
from wanduet.media.preview import SPATIAL_STRIDE, TEMPORAL_STRIDE, LatentToRGB
from wanduet.media.read import probe, read_frames
from wanduet.meta.init import without_memory
from wanduet.models.vae.model import WanVAE
from wanduet.weights.diffusers import ModelFolder

log = structlog.get_logger(__name__)

VIDEOS_TO_LEARN = 8  # more would change the map no more
_RIDGE = 1e-4  # keeps the map small where the finished videos show few colours
_CLIPS = (
    12  # made-up ones; of colours in its world, the miniature's map then explains 63 %, fitted to those themselves 80 %
)
_CLIP_SIZE = 64  # pixels a side
_CLIP_FRAMES = 1 + TEMPORAL_STRIDE

Row = tuple[float, float, float]

BUILT_IN: dict[str, tuple[Row, ...]] = {
    "miniature": (
        (-0.0345, -0.0806, -0.4697),
        (0.0026, 0.0521, 0.0459),
        (0.0591, 0.0427, 0.1988),
        (0.0478, 0.1507, 0.3425),
        (0.1159, 0.1263, 0.1127),
        (-0.0227, -0.1814, -0.2375),
        (0.2335, 0.4847, 0.4186),
        (0.0350, 0.1125, 0.1899),
        (0.0920, 0.1966, 0.1972),
        (0.0223, 0.0823, -0.2427),
        (0.1470, 0.0017, -0.0400),
        (-0.0004, -0.0329, -0.0997),
        (-0.0535, -0.1156, -0.0830),
        (-0.0714, 0.0692, -0.1302),
        (-0.0588, -0.0619, -0.1041),
        (0.0277, -0.0405, -0.0670),
        (0.4604, 0.3810, 0.3536),
    ),
}


class ColourMaps:
    """The maps from latents to colours, one a model: built in, or learned and kept in a folder."""

    def __init__(self, folder: Path, model: str, channels: int) -> None:
        self._path = folder / f"{''.join(c if c.isalnum() else '-' for c in model)[-80:]}.json"
        self._model = model
        self._channels = channels

    def load(self) -> LatentToRGB | None:
        """The model's map; None where nothing is known yet."""
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
        self._add(*normal_equations(latents, small_frames(video)))

    def fit_beside(self, folder: ModelFolder) -> threading.Thread | None:
        """Fit the map to the model's encoder in a thread, if there is none and nobody does so yet."""
        name = f"colours-{self._path.stem}"
        if self.load() is not None or any(thread.name == name for thread in threading.enumerate()):
            return None
        thread = threading.Thread(target=self._fit, args=(folder,), name=name)
        thread.start()
        return thread

    def _fit(self, folder: ModelFolder) -> None:
        began = time.perf_counter()
        try:
            gram, target = np.zeros((self._channels + 1,) * 2), np.zeros((self._channels + 1, 3))
            vae = load_encoder(folder)
            for clip in made_up_clips(_CLIPS):
                if not threading.main_thread().is_alive():  # the process ends, and waits for this thread
                    return
                more = normal_equations(vae.encode(clip[None])[0], latent_sized(clip / 2 + 0.5))
                gram, target = gram + more[0] / _CLIPS, target + more[1] / _CLIPS
            self._add(gram, target)
            log.info("previews learned the model's colours", seconds=round(time.perf_counter() - began, 1))
        except Exception as error:  # then the first finished video teaches them
            log.warning("no colours for previews yet", error=type(error).__name__)

    def _add(self, gram: NDArray[np.float64], target: NDArray[np.float64]) -> None:
        sums = self._read()
        sums = {
            "videos": sums["videos"] + 1,
            "gram": (np.array(sums["gram"]) + gram).tolist(),
            "target": (np.array(sums["target"]) + target).tolist(),
        }
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


def load_encoder(folder: ModelFolder) -> WanVAE:
    """A model's VAE on the CPU with the weights of its encoder; the decoder's hold no memory."""
    with without_memory():
        vae = WanVAE(folder.spec.vae).eval().requires_grad_(False)
    names = [name for name, _ in vae.named_parameters() if name.startswith(("encoder.", "quant_conv."))]
    vae.load_state_dict(folder.vae.read(names, torch.float32), strict=False, assign=True)
    return vae


def made_up_clips(count: int, seed: int = 0) -> Iterator[Tensor]:
    """Clips `[3, 5, 64, 64]` in -1 to 1: clouds of all sizes and colours that drift, as natural pictures have them."""
    generator = torch.Generator().manual_seed(seed)
    side = 2 * _CLIP_SIZE

    def clouds(channels: int) -> Tensor:
        found = torch.zeros(channels, side, side)
        for cells in (2, 4, 8, 16, 32):  # amplitudes fall with frequency
            grid = torch.randn(1, channels, cells, cells, generator=generator)
            found += (2 / cells) ** 0.5 * interpolate(grid, size=(side, side), mode="bilinear")[0]
        return found

    for _ in range(count):
        base = torch.randn(3, 1, 1, generator=generator)
        picture = (0.5 * clouds(1) + 0.35 * clouds(3) + 0.5 * base).clamp(-1, 1)
        down, right = torch.randint(-6, 7, (2,), generator=generator).tolist()
        moved = [torch.roll(picture, (i * down, i * right), (1, 2)) for i in range(_CLIP_FRAMES)]
        yield torch.stack([frame[:, :_CLIP_SIZE, :_CLIP_SIZE] for frame in moved], dim=1)


def latent_sized(clip: Tensor) -> NDArray[np.float32]:
    """A clip `[3, F, H, W]` averaged down to its latents' grid: `[T, h, w, 3]`."""
    small = torch.nn.functional.avg_pool2d(clip, SPATIAL_STRIDE)
    later = small[:, 1:].unflatten(1, (-1, TEMPORAL_STRIDE)).mean(2)
    found: NDArray[np.float32] = torch.cat([small[:, :1], later], dim=1).permute(1, 2, 3, 0).numpy()
    return found


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
