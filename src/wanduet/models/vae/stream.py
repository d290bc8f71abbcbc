"""Decodes latents to uint8 frames as a stream, for the thread that encodes the video.

Frame-major ("frame"), memory does not grow with the number of frames: each latent frame's pixels leave the device
before the next but one is decoded. Tile-major ("strip") keeps the feature cache of one row tile only, and yields all
frames at the end. Either way the pixels equal those of a whole decode. On the meta device the same code shows how much
memory it takes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wanduet.errors import NonFiniteFramesError
from wanduet.kernels.host_copy import HostCopy
from wanduet.models.vae.arena import Arena
from wanduet.models.vae.arena_size import DecodeShape, arena_bytes
from wanduet.models.vae.halo_offload import AsyncCopy, HaloOffload, HostTransfer
from wanduet.models.vae.layers import FeatureCache
from wanduet.models.vae.model import WanVAE, to_uint8
from wanduet.models.vae.rows import WHOLE_FRAMES, Rows, Tiling
from wanduet.models.vae.tiles import Halo

Frames = NDArray[np.uint8]  # [t, H, W, 3]
OnFrames = Callable[[int, int], None]
DecodeMid = Callable[[Tensor, FeatureCache], tuple[Tensor, FeatureCache]]  # as WanVAE.decode_mid
HINT = "Try --vae-dtype float32, or check the weights with `wanduet doctor`."


@dataclass(frozen=True, slots=True)
class DecodePart:
    """One rank's part of a frame-major decode: its pixel rows, its halos, and who computes the mid features.

    `above`, `below`: halos shared with the ranks of the rows above and below. `decode_mid` (default: the VAE's own)
    returns the mid features, for instance those that another rank sends.
    """

    rows: Rows
    above: Halo | None = None
    below: Halo | None = None
    decode_mid: DecodeMid | None = None


@torch.no_grad()
def decode_stream(
    vae: WanVAE,
    latents: Tensor,
    tiling: Tiling = WHOLE_FRAMES,
    on_frames: OnFrames | None = None,
    part: DecodePart | None = None,
) -> Iterator[Frames]:
    """Decode normalised latents `[16, T, h, w]` (on any device) to RGB frames `[1 or 4, H, W, 3]` uint8.

    With `part`, only its rows of each frame (its halos and `decode_mid` frame-major only). Yielded arrays are reused:
    copy what is needed before the next one is requested. `on_frames(done, total)` is called with the number of frames
    decoded so far. May run in any thread, one video at a time for each `vae`. Raises NonFiniteFramesError instead of
    yielding frames with NaN or infinity.
    """
    decode = _Decode(vae, latents, tiling, on_frames, part)
    try:
        yield from (decode.frame_major() if tiling.order == "frame" else decode.tile_major())
    finally:
        vae.reuse_caches(False)


@dataclass(slots=True)
class _FrameCopy:
    """Frames on their way to the host; `finite` says of each part of them whether it has neither NaN nor infinity."""

    host: Tensor
    copied: "torch.cuda.Event | None"
    finite: tuple[HostCopy, ...] = ()

    def wait(self) -> Frames:
        """The frames, once they have arrived. Raises NonFiniteFramesError."""
        if self.copied is not None:
            self.copied.synchronize()
        if not all(bool(one.wait()) for one in self.finite):
            raise NonFiniteFramesError("The VAE gave NaN or infinity instead of a picture.", hint=HINT)
        array: Frames = self.host.numpy()
        return array


class _Decode:
    """The state of one decode, in either order."""

    def __init__(
        self, vae: WanVAE, latents: Tensor, tiling: Tiling, on_frames: OnFrames | None, part: DecodePart | None
    ) -> None:
        weight = vae.post_quant_conv.weight
        self.vae, self.device = vae, weight.device
        # Each latent frame contiguous and page-locked: otherwise its copy would wait for all work queued on the device.
        self.latents = latents.to(weight.dtype).transpose(0, 1).contiguous()
        if self.device.type == "cuda" and not self.latents.is_cuda:
            self.latents = self.latents.pin_memory()
        self.length = latents.shape[1]
        stride = vae.spec.spatial_stride
        self.width = latents.shape[3] * stride
        self.part = part or DecodePart(Rows.whole(latents.shape[2] * stride))
        self.rows = self.part.rows
        self.num_frames = (self.length - 1) * vae.spec.temporal_stride + 1
        self.on_frames = on_frames
        tiles = (self.rows.common(tile) for tile in tiling.tiles(self.rows.height))
        self.tiles = [tile for tile in tiles if tile.count]
        self._buffers: list[Tensor] = []
        self._sent = 0
        self._arena: Arena | None = None
        if self.device.type in ("cuda", "meta"):
            size = (self.rows.height, self.width, self.num_frames)
            shape = DecodeShape(vae.spec, *size, tiling, weight.dtype, vae.kernels)
            self._arena = Arena(arena_bytes(shape, self.tiles), self.device)

    def frame_major(self) -> Iterator[Frames]:
        """For each latent frame, decode all tiles."""
        decode_mid = self.part.decode_mid or self.vae.decode_mid
        mid_cache: FeatureCache = None
        caches: list[FeatureCache] = [None] * len(self.tiles)
        halos = [self.part.above, *(Halo(tile, self._arena) for tile in self.tiles[:-1]), self.part.below]
        before: _FrameCopy | None = None
        done = 0
        for index in range(self.length):
            self.vae.reuse_caches(arena=self._arena)
            mid, mid_cache = decode_mid(self._latent(index), mid_cache)
            picture: Tensor | None = None
            finite: tuple[HostCopy, ...] = ()
            for number, rows in enumerate(self.tiles):
                pixels, caches[number] = self.vae.decode_rows(mid, caches[number], rows, *halos[number : number + 2])
                frames, finite = to_uint8(pixels), finite + _finite(pixels)
                if picture is None:
                    shape = (frames.shape[0], self.rows.count, self.width, 3)
                    picture = torch.empty(shape, dtype=torch.uint8, device=self.device)
                picture[:, self._place(rows)] = frames
                del pixels, frames
            assert picture is not None
            # While the caller encodes the last frames, these are copied to the host and the next are decoded.
            copying = self._send(picture, finite)
            if before is not None:
                yield before.wait()
            before = copying
            done += picture.shape[0]
            self._report(done)
        if before is not None:
            yield before.wait()

    def tile_major(self) -> Iterator[Frames]:
        """For each tile, decode all frames. Mid features and halo rows wait in host memory."""
        video = np.empty((self.num_frames, self.rows.count, self.width, 3), np.uint8)
        transfer = HostTransfer(self.device)
        try:
            self._fill(video, transfer)
        finally:
            transfer.sync()
        for begin in range(0, self.num_frames, self.vae.spec.temporal_stride):
            yield video[begin : begin + self.vae.spec.temporal_stride]

    def _fill(self, video: Frames, transfer: HostTransfer) -> None:
        """Decode tile by tile into the video `[num_frames, rows, W, 3]`."""
        mids = self._mid_features(transfer)
        before: tuple[_FrameCopy, int, Rows] | None = None
        above: HaloOffload | None = None
        for number, rows in enumerate(self.tiles):
            feature_cache: FeatureCache = None
            begin = 0
            below = HaloOffload(rows, self._arena, transfer) if number + 1 < len(self.tiles) else None
            if self._arena is not None:
                self._arena.reset()
            # Two buffers, used alternately: one allocation a step would fragment the memory of intermediate results.
            buffers = [transfer.device_like(mids[0], self._arena) for _ in mids[:2]]
            (next_mid,) = transfer.copy([(mids[0], buffers[0])])
            for step in range(self.length):
                self.vae.reuse_caches(arena=self._arena)
                mid = next_mid.wait()
                if above is not None:
                    above.prefetch(step)
                if step + 1 < self.length:
                    (next_mid,) = transfer.copy([(mids[step + 1], buffers[(step + 1) % 2])])
                pixels, feature_cache = self.vae.decode_rows(mid, feature_cache, rows, above, below)
                if below is not None:
                    below.evict()
                copying = self._send(to_uint8(pixels), _finite(pixels))
                del mid, pixels
                if before is not None:
                    self._put(video, *before)
                before = copying, begin, rows
                begin += copying.host.shape[0]
                self._report((number * self.num_frames + begin) // len(self.tiles))
            for halo in (above, below):
                if halo is not None:
                    halo.finish()
            above = below
        if before is not None:
            self._put(video, *before)

    def _mid_features(self, transfer: HostTransfer) -> list[Tensor]:
        """The mid features of every latent frame, in host memory."""
        feature_cache: FeatureCache = None
        copies: list[AsyncCopy] = []
        for index in range(self.length):
            self.vae.reuse_caches(arena=self._arena)
            mid, feature_cache = self.vae.decode_mid(self._latent(index), feature_cache)
            if copies:
                copies[-1].wait()  # from here on its source may be overwritten
            copies += transfer.to_host([mid])
        copies[-1].wait()
        return [copy.target for copy in copies]

    def _put(self, video: Frames, frames: _FrameCopy, begin: int, rows: Rows) -> None:
        """Write a tile's frames into the video `[num_frames, rows, W, 3]`, from frame `begin` on."""
        arrived = frames.wait()
        video[begin : begin + arrived.shape[0], self._place(rows)] = arrived

    def _place(self, tile: Rows) -> slice:
        """Where a tile's rows are among the rows of this decode."""
        return slice(tile.start - self.rows.start, tile.stop - self.rows.start)

    def _latent(self, index: int) -> Tensor:
        """One latent frame `[1, 16, 1, h, w]` on the VAE's device."""
        return self.latents[index].to(self.device, non_blocking=True)[None, :, None]

    def _send(self, picture: Tensor, finite: tuple[HostCopy, ...]) -> _FrameCopy:
        """Start to copy frames `[t, rows, W, 3]` to the host, into one of two buffers, used alternately."""
        if picture.is_meta:
            return _FrameCopy(torch.empty_like(picture, device="cpu"), None)
        if not picture.is_cuda:
            return _FrameCopy(picture.cpu(), None, finite)
        while len(self._buffers) < 2:
            shape = (self.vae.spec.temporal_stride, self.rows.count, self.width, 3)
            self._buffers.append(torch.empty(shape, dtype=torch.uint8, pin_memory=True))
        frames, rows = picture.shape[:2]
        host = self._buffers[self._sent % 2].view(-1)[: picture.numel()].view(frames, rows, self.width, 3)
        self._sent += 1
        host.copy_(picture, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self.device))
        return _FrameCopy(host, copied, finite)

    def _report(self, done: int) -> None:
        if self.on_frames is not None:
            self.on_frames(done, self.num_frames)


def _finite(pixels: Tensor) -> tuple[HostCopy, ...]:
    """Start to check that pixels are finite; empty on the meta device. As uint8, NaN would silently be black.

    Checking the sum takes no memory, and the host does not wait for it.
    """
    return () if pixels.is_meta else (HostCopy(torch.isfinite(pixels.sum(dtype=torch.float32))),)
