"""Latents to uint8 frames as a stream: what the encoder thread is fed with.

Frame-major, memory does not grow with the number of frames: each latent frame's pixels leave the device
before the next but one is decoded. Strip-major keeps the history of one strip of rows only, and gives all
frames at the end. Either way the pixels are the same as those of a whole decode.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wanduet.models.vae import WanVAE
from wanduet.models.vae_layers import Past
from wanduet.models.vae_rows import DecodePlan, Rows, split_rows

Frames = NDArray[np.uint8]  # [t, H, W, 3]
OnFrames = Callable[[int, int], None]
WHOLE_FRAMES = DecodePlan()


@torch.no_grad()
def decode_stream(
    vae: WanVAE,
    latents: Tensor,
    plan: DecodePlan = WHOLE_FRAMES,
    on_frames: OnFrames | None = None,
    rows: Rows | None = None,
) -> Iterator[Frames]:
    """Decode latents `[16, T, h, w]` (normalised, on any device) to RGB frames `[1 or 4, H, W, 3]` uint8.

    With `rows` (in pixels) only these of each frame: what one rank of several does. Yielded arrays are
    reused: take what is needed before asking for more. `on_frames(done, total)` counts frames decoded so
    far. Decoding may run in any thread, one video at a time for each `vae`.
    """
    vae.own_pasts()
    job = _Decode(vae, latents, plan, on_frames, rows)
    try:
        yield from job.frame_major() if plan.order == "frame" else job.strip_major()
    finally:
        vae.own_pasts(False)


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels `[1, 3, t, h, w]` in [-1, 1] to `[t, h, w, 3]` uint8, rounded to nearest."""
    return pixels[0].mul(127.5).add_(127.5).round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 3, 0)


@dataclass(slots=True)
class _OnTheWay:
    """Frames that are being copied to the host."""

    host: Tensor
    copied: "torch.cuda.Event | None"

    def arrive(self) -> Frames:
        if self.copied is not None:
            self.copied.synchronize()
        array: Frames = self.host.numpy()
        return array


class _Decode:
    """One decode: what both orders share."""

    def __init__(
        self, vae: WanVAE, latents: Tensor, plan: DecodePlan, on_frames: OnFrames | None, rows: Rows | None
    ) -> None:
        weight = vae.post_quant_conv.weight
        self.vae, self.device = vae, weight.device
        self.latents = latents.to(weight.dtype)
        self.length = latents.shape[1]
        stride = vae.spec.spatial_stride
        self.width = latents.shape[3] * stride
        self.rows = rows or Rows.whole(latents.shape[2] * stride)
        self.num_frames = (self.length - 1) * vae.spec.temporal_stride + 1
        self.on_frames = on_frames
        self.strips = split_rows(self.rows, [1.0] * plan.num_strips)
        self._buffers: list[Tensor] = []

    def frame_major(self) -> Iterator[Frames]:
        trunk: Past = None
        pasts: list[Past] = [None] * len(self.strips)
        before: _OnTheWay | None = None
        done = 0
        for index in range(self.length):
            mid, trunk = self.vae.decode_trunk(self._latent(index), trunk)
            picture: Tensor | None = None
            for number, rows in enumerate(self.strips):
                pixels, pasts[number] = self.vae.decode_rows(mid, pasts[number], rows)
                part = to_uint8(pixels)
                if picture is None:
                    shape = (part.shape[0], self.rows.count, self.width, 3)
                    picture = torch.empty(shape, dtype=torch.uint8, device=self.device)
                picture[:, self._place(rows)] = part
                del pixels, part
            assert picture is not None
            # These frames travel, and the next are being decoded, while the ones before are encoded.
            leaving = self._send(picture, index)
            if before is not None:
                yield before.arrive()
            before = leaving
            done += picture.shape[0]
            self._tell(done)
        if before is not None:
            yield before.arrive()

    def strip_major(self) -> Iterator[Frames]:
        """The middle's features of all frames are kept (small); the big layers run strip after strip."""
        trunk: Past = None
        middles = []
        for index in range(self.length):
            mid, trunk = self.vae.decode_trunk(self._latent(index), trunk)
            middles.append(mid)
        trunk = None
        video = np.empty((self.num_frames, self.rows.count, self.width, 3), np.uint8)
        for number, rows in enumerate(self.strips):
            past: Past = None
            begin = 0
            for mid in middles:
                pixels, past = self.vae.decode_rows(mid, past, rows)
                part = to_uint8(pixels)
                video[begin : begin + part.shape[0], self._place(rows)] = part.cpu().numpy()
                begin += part.shape[0]
                del pixels, part
                self._tell((number * self.num_frames + begin) // len(self.strips))
        for begin in range(0, self.num_frames, self.vae.spec.temporal_stride):
            yield video[begin : begin + self.vae.spec.temporal_stride]

    def _place(self, strip: Rows) -> slice:
        """Where a strip's rows are among the wanted ones."""
        return slice(strip.start - self.rows.start, strip.stop - self.rows.start)

    def _latent(self, index: int) -> Tensor:
        """One latent frame `[1, 16, 1, h, w]` on the VAE's device."""
        return self.latents[None, :, index : index + 1].to(self.device, non_blocking=True)

    def _send(self, picture: Tensor, index: int) -> _OnTheWay:
        """Start the copy of frames `[t, H, W, 3]` to the host, into one of two buffers."""
        if not picture.is_cuda:
            return _OnTheWay(picture.cpu(), None)
        while len(self._buffers) < 2:
            shape = (self.vae.spec.temporal_stride, self.rows.count, self.width, 3)
            self._buffers.append(torch.empty(shape, dtype=torch.uint8, pin_memory=True))
        host = self._buffers[index % 2][: picture.shape[0]]
        host.copy_(picture, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self.device))
        return _OnTheWay(host, copied)

    def _tell(self, done: int) -> None:
        if self.on_frames is not None:
            self.on_frames(done, self.num_frames)
