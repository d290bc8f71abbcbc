"""Latents to uint8 frames as a stream: what the encoder thread is fed with.

Frame-major, memory does not grow with the number of frames: each latent frame's pixels leave the device
before the next but one is decoded. Strip-major keeps the history of one strip of rows only, and gives all
frames at the end. Either way the pixels are the same as those of a whole decode. On the meta device the same code
shows how much memory it takes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wanduet.errors import NonFiniteFramesError
from wanduet.kernels.host_copy import HostCopy
from wanduet.models.vae.arena import Arena
from wanduet.models.vae.arena_size import arena_bytes
from wanduet.models.vae.halo_offload import Copying, HaloOffload, Host
from wanduet.models.vae.layers import FeatureCache
from wanduet.models.vae.model import WanVAE, to_uint8
from wanduet.models.vae.rows import Rows, Tiling
from wanduet.models.vae.tiles import Halo

Frames = NDArray[np.uint8]  # [t, H, W, 3]
OnFrames = Callable[[int, int], None]
Trunk = Callable[[Tensor, FeatureCache], tuple[Tensor, FeatureCache]]  # as WanVAE.decode_mid
WHOLE_FRAMES = Tiling()
_HINT = "Try --vae-dtype float32, or check the weights with `wanduet doctor`."


@torch.no_grad()
def decode_stream(
    vae: WanVAE,
    latents: Tensor,
    plan: Tiling = WHOLE_FRAMES,
    on_frames: OnFrames | None = None,
    rows: Rows | None = None,
    above: Halo | None = None,
    below: Halo | None = None,
    trunk: Trunk | None = None,
) -> Iterator[Frames]:
    """Decode latents `[16, T, h, w]` (normalised, on any device) to RGB frames `[1 or 4, H, W, 3]` uint8.

    With `rows` (in pixels) only these of each frame: what one rank of several does, with seams to those that do the
    rows above and below, and perhaps a `trunk` that is another's (frame-major only). Yielded arrays are reused: take what is
    needed before asking for more. `on_frames(done, total)` counts frames decoded so far. Decoding may run in any thread, one
    video at a time for each `vae`. Raises NonFiniteFramesError instead of yielding frames that hold NaN or infinity.
    """
    job = _Decode(vae, latents, plan, on_frames, rows)
    try:
        yield from (
            job.frame_major(above, below, trunk or vae.decode_mid) if plan.order == "frame" else job.strip_major()
        )
    finally:
        vae.reuse_caches(False)


@dataclass(slots=True)
class _OnTheWay:
    """Frames that are being copied to the host."""

    host: Tensor
    copied: "torch.cuda.Event | None"
    finite: tuple[HostCopy, ...] = field(default=())  # whether each part of them is

    def arrive(self) -> Frames:
        if self.copied is not None:
            self.copied.synchronize()
        if not all(bool(one.wait()) for one in self.finite):
            raise NonFiniteFramesError("The VAE gave NaN or infinity instead of a picture.", hint=_HINT)
        array: Frames = self.host.numpy()
        return array


class _Decode:
    """One decode: what both orders share."""

    def __init__(
        self, vae: WanVAE, latents: Tensor, plan: Tiling, on_frames: OnFrames | None, rows: Rows | None
    ) -> None:
        weight = vae.post_quant_conv.weight
        self.vae, self.device, self.plan = vae, weight.device, plan
        # Each frame of them in one piece and page-locked: else to copy it would wait for all that the device has to do.
        self.latents = latents.to(weight.dtype).transpose(0, 1).contiguous()
        if self.device.type == "cuda" and not self.latents.is_cuda:
            self.latents = self.latents.pin_memory()
        self.length = latents.shape[1]
        stride = vae.spec.spatial_stride
        self.width = latents.shape[3] * stride
        self.rows = rows or Rows.whole(latents.shape[2] * stride)
        self.num_frames = (self.length - 1) * vae.spec.temporal_stride + 1
        self.on_frames = on_frames
        strips = (self.rows.common(strip) for strip in plan.strips(self.rows.height))
        self.strips = [strip for strip in strips if strip.count]
        self._buffers: list[Tensor] = []
        self._sent = 0
        self._history: Arena | None = None
        if self.device.type in ("cuda", "meta"):
            size = (self.rows.height, self.width, self.num_frames)
            needed = arena_bytes(vae.spec, *size, plan, self.strips, weight.dtype, vae.kernels)
            self._history = Arena(needed, self.device)

    def frame_major(self, above: Halo | None, below: Halo | None, trunk: Trunk) -> Iterator[Frames]:
        trunk_past: FeatureCache = None
        pasts: list[FeatureCache] = [None] * len(self.strips)
        seams = [above, *(Halo(strip, self._history) for strip in self.strips[:-1]), below]
        before: _OnTheWay | None = None
        done = 0
        for index in range(self.length):
            self.vae.reuse_caches(history=self._history)
            mid, trunk_past = trunk(self._latent(index), trunk_past)
            picture: Tensor | None = None
            finite: tuple[HostCopy, ...] = ()
            for number, rows in enumerate(self.strips):
                pixels, pasts[number] = self.vae.decode_rows(mid, pasts[number], rows, *seams[number : number + 2])
                part, finite = to_uint8(pixels), finite + _finite(pixels)
                if picture is None:
                    shape = (part.shape[0], self.rows.count, self.width, 3)
                    picture = torch.empty(shape, dtype=torch.uint8, device=self.device)
                picture[:, self._place(rows)] = part
                del pixels, part
            assert picture is not None
            # These frames travel, and the next are being decoded, while the ones before are encoded.
            leaving = self._send(picture, finite)
            if before is not None:
                yield before.arrive()
            before = leaving
            done += picture.shape[0]
            self._tell(done)
        if before is not None:
            yield before.arrive()

    def strip_major(self) -> Iterator[Frames]:
        """The trunk's features of all frames wait on the host; the big layers run strip after strip, and what a strip
        hands on to the next waits there too."""
        video = np.empty((self.num_frames, self.rows.count, self.width, 3), np.uint8)
        host = Host(self.device)
        try:
            self._fill(video, host)
        finally:
            host.settle()
        for begin in range(0, self.num_frames, self.vae.spec.temporal_stride):
            yield video[begin : begin + self.vae.spec.temporal_stride]

    def _fill(self, video: Frames, host: Host) -> None:
        """Decode strip by strip into the video `[num_frames, rows, W, 3]`."""
        middles = self._middles(host)
        before: tuple[_OnTheWay, int, Rows] | None = None
        above: HaloOffload | None = None
        for number, rows in enumerate(self.strips):
            past: FeatureCache = None
            begin = 0
            below = HaloOffload(rows, self._history, host) if number + 1 < len(self.strips) else None
            if self._history is not None:
                self._history.forget()
            # In turns: an allocation each would lie among what comes and goes.
            places = [host.room_for(middles[0], self._history) for _ in middles[:2]]
            (coming,) = host.copy([(middles[0], places[0])])
            for step in range(self.length):
                self.vae.reuse_caches(history=self._history)
                mid = coming.arrive()
                if above is not None:
                    above.bring(step)
                if step + 1 < self.length:
                    (coming,) = host.copy([(middles[step + 1], places[(step + 1) % 2])])
                pixels, past = self.vae.decode_rows(mid, past, rows, above, below)
                if below is not None:
                    below.leave()
                leaving = self._send(to_uint8(pixels), _finite(pixels))
                del mid, pixels
                if before is not None:
                    self._put(video, *before)
                before = leaving, begin, rows
                begin += leaving.host.shape[0]
                self._tell((number * self.num_frames + begin) // len(self.strips))
            for seam in (above, below):
                if seam is not None:
                    seam.finish()
            above = below
        if before is not None:
            self._put(video, *before)

    def _middles(self, host: Host) -> list[Tensor]:
        """The trunk's features of every latent frame, on the host."""
        trunk: FeatureCache = None
        leaving: list[Copying] = []
        for index in range(self.length):
            self.vae.reuse_caches(history=self._history)
            mid, trunk = self.vae.decode_mid(self._latent(index), trunk)
            if leaving:
                leaving[-1].arrive()  # from here on its memory may be overwritten
            leaving += host.send([mid])
        leaving[-1].arrive()
        return [copying.target for copying in leaving]

    def _put(self, video: Frames, part: _OnTheWay, begin: int, rows: Rows) -> None:
        """Into the video `[num_frames, rows, W, 3]`: frames of a strip, from frame `begin` on."""
        arrived = part.arrive()
        video[begin : begin + arrived.shape[0], self._place(rows)] = arrived

    def _place(self, strip: Rows) -> slice:
        """Where a strip's rows are among the wanted ones."""
        return slice(strip.start - self.rows.start, strip.stop - self.rows.start)

    def _latent(self, index: int) -> Tensor:
        """One latent frame `[1, 16, 1, h, w]` on the VAE's device."""
        return self.latents[index].to(self.device, non_blocking=True)[None, :, None]

    def _send(self, picture: Tensor, finite: tuple[HostCopy, ...]) -> _OnTheWay:
        """Start the copy of frames `[t, rows, W, 3]` to the host, into one of two buffers."""
        if picture.is_meta:
            return _OnTheWay(torch.empty_like(picture, device="cpu"), None)
        if not picture.is_cuda:
            return _OnTheWay(picture.cpu(), None, finite)
        while len(self._buffers) < 2:
            shape = (self.vae.spec.temporal_stride, self.rows.count, self.width, 3)
            self._buffers.append(torch.empty(shape, dtype=torch.uint8, pin_memory=True))
        frames, rows = picture.shape[:2]
        host = self._buffers[self._sent % 2].view(-1)[: picture.numel()].view(frames, rows, self.width, 3)
        self._sent += 1
        host.copy_(picture, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self.device))
        return _OnTheWay(host, copied, finite)

    def _tell(self, done: int) -> None:
        if self.on_frames is not None:
            self.on_frames(done, self.num_frames)


def _finite(pixels: Tensor) -> tuple[HostCopy, ...]:
    """Ask whether pixels are finite, by their sum: that takes no memory, and the host waits for nothing. As bytes, NaN
    would be black without a word.
    """
    return () if pixels.is_meta else (HostCopy(torch.isfinite(pixels.sum(dtype=torch.float32))),)
