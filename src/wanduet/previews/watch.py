"""Writes previews during a denoise: after some of the steps, the predicted clean video as an animated WebP.

The latents after two consecutive steps are extrapolated to sigma 0. A small decoder turns the result into pictures if
its weights are in one of the folders that `find_decoder` searches, otherwise a linear map from latents to colours.
"""

import io
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import structlog
from PIL import Image
from torch import Tensor

from wanduet.folders import make_folder, replace_file
from wanduet.media.codecs import Frame
from wanduet.media.preview import resize
from wanduet.previews.colour_maps import LatentToRGB, find_colours
from wanduet.previews.decoders import DecodedPictures, find_decoder
from wanduet.request import GenerationRequest

if TYPE_CHECKING:
    from wanduet.runtime.models import Models

log = structlog.get_logger(__name__)

TEMPORAL_STRIDE = 4  # frames for one latent frame, after the first
LONGEST_SIDE = 160  # of a preview made with a linear map, in pixels
MAX_FRAMES = 24
TIME_SHARE = 0.02  # of a denoise's time, at most, is spent on previews
MIN_PAUSE = 0.5  # seconds between two previews


class Step(Protocol):
    """The fields of `wanduet.sampling.denoise.StepInfo` that a preview needs."""

    @property
    def step(self) -> int:
        """From 0."""

    @property
    def num_steps(self) -> int:
        """Of the denoise."""

    @property
    def sigma(self) -> float:
        """Before the step."""

    @property
    def latents(self) -> Tensor:
        """After the step."""


class Previews:
    """The engine's `watch` callback for one job. Never raises.

    `target`: the file that previews of the denoise are written to, or a function that takes them.
    """

    def __init__(
        self,
        target: Path | Callable[[bytes], None],
        colours: LatentToRGB | None,
        request: GenerationRequest,
        decoder: DecodedPictures | None = None,
    ) -> None:
        self._write = partial(write_picture, target) if isinstance(target, Path) else target
        self._colours = colours
        self._fps = max(1.0, (request.fps or 16) / TEMPORAL_STRIDE)
        self._decoder = decoder
        self._last_steps: tuple[Step, ...] = ()  # at most two
        self._next_time = 0.0

    def __call__(self, info: Step) -> None:
        """Called after a step; writes a new picture if the pause after the last one is over."""
        try:
            self._update(info)
        except Exception as error:  # a job must not fail because of a preview
            log.warning("no preview", error=type(error).__name__)

    def _update(self, info: Step) -> None:
        steps, self._last_steps = self._last_steps, (*self._last_steps[-1:], info)
        last = info.step + 1 == info.num_steps
        if last:
            self._last_steps = ()
        if time.perf_counter() < self._next_time and not last:
            return
        clean = info.latents if last else predict_clean(steps, info.sigma)
        if clean is None:
            return
        began = time.perf_counter()
        try:
            picture = self._paint(clean[0])
            if picture is not None:
                self._write(picture)
        finally:  # also after an error, so that it is not repeated at each step
            now = time.perf_counter()
            self._next_time = now + max(MIN_PAUSE, (now - began) / TIME_SHARE)

    def _paint(self, latents: Tensor) -> bytes | None:
        """Latents `[C, T, h, w]` as an animated WebP; None if there is neither a decoder nor a map."""
        if self._decoder is not None:
            try:
                return moving_picture(self._decoder(latents), self._fps, self._decoder.longest_side)
            except Exception as error:  # out of memory, or a damaged file: use the map from here on
                log.warning("the preview decoder cannot be used", error=type(error).__name__)
                self._decoder = None
        return None if self._colours is None else moving_picture(self._colours(latents), self._fps)


def watch_job(models: "Models", data_folder: Path, path: Path, request: GenerationRequest) -> Previews:
    """A `watch` callback for a job of an engine with these models, which writes to `path`."""
    folder = None if models.folder is None else models.folder.path
    decoder = None if folder is None else find_decoder(models.spec, folder, data_folder / "previews")
    return Previews(path, find_colours(models.spec, folder), request, decoder)


def predict_clean(steps: Sequence[Step], sigma: float) -> Tensor | None:
    """Extrapolate the latents after two consecutive steps to sigma 0; None if `steps` are not two consecutive ones, of
    latents of one shape.

    `sigma` is the noise level of the newer step's result. Exact for Euler steps, each of which moves the latents
    along the line to the model's prediction of the clean latents.
    """
    if len(steps) < 2 or steps[1].step != steps[0].step + 1:
        return None
    older, newer = steps
    if older.latents.shape != newer.latents.shape:  # enlarged between the two
        return None
    slope = (newer.latents - older.latents) / (sigma - newer.sigma)
    return newer.latents - sigma * slope


def moving_picture(frames: Frame, fps: float, longest_side: int = LONGEST_SIDE) -> bytes:
    """Frames `[T, h, w, 3]` as an animated WebP."""
    step = -(-len(frames) // MAX_FRAMES)
    pictures = [Image.fromarray(resize(frame, longest_side)) for frame in frames[::step]]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, "WEBP", save_all=True, append_images=pictures[1:], duration=round(1000 * step / fps), loop=0, quality=70
    )
    return buffer.getvalue()


def write_picture(path: Path, picture: bytes) -> None:
    """Replace a picture atomically, without fsync: it need not survive a power cut."""
    make_folder(path.parent)
    unfinished = path.with_suffix(".partial")
    unfinished.write_bytes(picture)
    replace_file(unfinished, path)
