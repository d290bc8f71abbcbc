"""The video taking shape: after denoising steps, the clean video foreseen so far as a small moving picture.

Two results of steps in a row lie on a line from noise to video; where that line ends without noise is what
the model foresees. A small decoder turns it into a picture where one was put beside the model, else a linear map
from latents to colours, which costs next to nothing.
"""

import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import structlog
from PIL import Image
from torch import Tensor

from wanduet.folders import make_folder, replace_file
from wanduet.media.codecs import Frame
from wanduet.media.preview import TEMPORAL_STRIDE, LatentToRGB, resize
from wanduet.previews.colour_maps import find_colours
from wanduet.previews.decoders import DecodedPictures, find_decoder
from wanduet.request import GenerationRequest

if TYPE_CHECKING:
    from wanduet.engine.build import Models

log = structlog.get_logger(__name__)

LONGEST_SIDE = 160  # of a preview through a map, in pixels
MOST_FRAMES = 24
SHARE = 0.02  # of the time of a denoise that previews may take
SHORTEST_PAUSE = 0.5  # seconds between two previews


class Step(Protocol):
    """What a preview needs of `wanduet.sampling.denoise.StepInfo`."""

    step: int
    num_steps: int
    sigma: float
    latents: Tensor


class Previews:
    """The previews of one job's denoise: give it to the engine as `watch`. Never raises."""

    def __init__(
        self,
        path: Path,
        colours: LatentToRGB | None,
        request: GenerationRequest,
        decoder: DecodedPictures | None = None,
    ) -> None:
        self._path = path
        self._colours = colours
        self._fps = max(1.0, (request.fps or 16) / TEMPORAL_STRIDE)
        self._decoder = decoder
        self._seen: tuple[Step, ...] = ()  # the last two steps
        self._next = 0.0

    def __call__(self, info: Step) -> None:
        """After a step: a new picture, if it is time for one."""
        try:
            self._see(info)
        except Exception as error:  # a picture is not worth a job
            log.warning("no preview", error=type(error).__name__)

    def _see(self, info: Step) -> None:
        seen, self._seen = self._seen, (*self._seen[-1:], info)
        last = info.step + 1 == info.num_steps
        if last:
            self._seen = ()
        if time.perf_counter() < self._next and not last:
            return
        foreseen = info.latents if last else foresee(seen, info.sigma)
        if foreseen is None:
            return
        began = time.perf_counter()
        try:
            picture = self._paint(foreseen[0])
            if picture is not None:
                self._write(picture)
        finally:  # one that fails is not tried again at each step
            now = time.perf_counter()
            self._next = now + max(SHORTEST_PAUSE, (now - began) / SHARE)

    def _paint(self, latents: Tensor) -> bytes | None:
        """Latents `[C, T, h, w]` as a moving picture; None where there is neither a decoder nor a map."""
        if self._decoder is not None:
            try:
                return moving_picture(self._decoder(latents), self._fps, self._decoder.longest_side)
            except Exception as error:  # no memory for it, or a file that is none: the map needs neither
                log.warning("the preview decoder cannot be used", error=type(error).__name__)
                self._decoder = None
        return None if self._colours is None else moving_picture(self._colours(latents), self._fps)

    def _write(self, picture: bytes) -> None:
        """Replace the picture whole; it need not survive a power cut."""
        make_folder(self._path.parent)
        partial = self._path.with_suffix(".partial")
        partial.write_bytes(picture)
        replace_file(partial, self._path)


def watch_job(models: "Models", data_folder: Path, path: Path, request: GenerationRequest) -> Previews:
    """The previews of a job that an engine with these models runs, at a path."""
    folder = None if models.folder is None else models.folder.path
    decoder = None if folder is None else find_decoder(models.spec, folder, data_folder / "previews")
    return Previews(path, find_colours(models.spec, folder), request, decoder)


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


def moving_picture(frames: Frame, fps: float, longest_side: int = LONGEST_SIDE) -> bytes:
    """Frames `[T, h, w, 3]` as an animated WebP."""
    step = -(-len(frames) // MOST_FRAMES)
    pictures = [Image.fromarray(resize(frame, longest_side)) for frame in frames[::step]]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, "WEBP", save_all=True, append_images=pictures[1:], duration=round(1000 * step / fps), loop=0, quality=70
    )
    return buffer.getvalue()
