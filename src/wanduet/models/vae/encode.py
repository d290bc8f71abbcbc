"""Encodes a video to latents as a stream.

With one row tile, memory does not grow with the number of frames. With several, each tile runs on all frames before the
next one begins: the device has the feature cache of one tile only, and the host keeps the frames, the features before
the mid block and the halos. On the meta device the same code shows how much memory it takes.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wanduet.errors import NonFiniteFramesError
from wanduet.kernels.host_copy import HostCopy
from wanduet.models.vae.halo_offload import AsyncCopy, HaloOffload, HostTransfer
from wanduet.models.vae.layers import FeatureCache
from wanduet.models.vae.model import WanVAE
from wanduet.models.vae.stream import HINT

Frames = NDArray[np.uint8] | NDArray[np.float32]  # [t, H, W, 3]; floats are in -1..1
OnEncoded = Callable[[int], None]


@torch.no_grad()
def encode_stream(
    vae: WanVAE, frames: Iterable[Frames], num_tiles: int = 1, on_frames: OnEncoded | None = None
) -> Tensor:
    """Encode RGB frames to normalised latents `[16, T, h, w]`, float32 on the host: the mode of the posterior.

    `frames` yields `[t, H, W, 3]` uint8, or float32 in -1..1, first one frame, then four at a time; H and W are
    multiples of 8. A chunk's memory may be reused once the next one is requested. `num_tiles`: the number of row tiles;
    the latents are the same for each. `on_frames(done)` is called after each step, `done` is the finished work in
    frames. May run in any thread, one video at a time for each `vae`. Raises ValueError for chunks of another number of
    frames or for none, NonFiniteFramesError for NaN or infinity.
    """
    chunks = _checked(frames, vae.spec.temporal_stride)
    first = next(chunks, None)
    if first is None:
        raise ValueError("There are no frames to encode.")
    encode = _Encode(vae, first.shape[1], num_tiles, on_frames)
    vae.reuse_caches()
    try:
        return encode.run(chain((first,), chunks))
    finally:
        encode.transfer.sync()
        vae.reuse_caches(False)


class _Encode:
    """The state of one encode of frames of `height` pixels."""

    def __init__(self, vae: WanVAE, height: int, num_tiles: int, on_frames: OnEncoded | None) -> None:
        self.vae, self.on_frames = vae, on_frames
        self.device, self.dtype = vae.quant_conv.weight.device, vae.quant_conv.weight.dtype
        tiles = vae.encode_tiles(height, num_tiles)
        # For a prediction of memory three tiles suffice: all but the first and the last are alike.
        self.tiles = tiles[:3] if self.device.type == "meta" else tiles
        self._missing = tiles[-1].stop - self.tiles[-1].stop
        self.transfer = HostTransfer(self.device)
        self._features: list[list[Tensor]] = []  # on the host, of each step: of the tiles that are done
        self._num_frames = 0

    def run(self, chunks: Iterable[Frames]) -> Tensor:
        """The latents. All tiles but the last keep their features on the host."""
        kept: list[Frames] = []
        above: HaloOffload | None = None
        if len(self.tiles) > 1:
            chunks = _kept(chunks, kept)
        for number in range(len(self.tiles) - 1):
            below = HaloOffload(self.tiles[number], None, self.transfer)
            self._upper(number, chunks, above, below)
            chunks, above = kept, below
        return self._lowest(chunks, above)

    def _upper(self, number: int, chunks: Iterable[Frames], above: HaloOffload | None, below: HaloOffload) -> None:
        """Run a tile on all frames; its features and its halo for the tile below go to the host."""
        copy: AsyncCopy | None = None
        for step, features in self._run_tile(number, chunks, above, below):
            below.evict()
            if copy is not None:
                copy.wait()  # from here on its source may be overwritten
            source = features.clone()  # without gaps
            (copy,) = self.transfer.to_host([source])
            if number == 0:
                self._features.append([])
            self._features[step].append(copy.target)
        below.finish()

    def _lowest(self, chunks: Iterable[Frames], above: HaloOffload | None) -> Tensor:
        """Run the last tile on all frames and the mid block after each step. Returns the latents."""
        latents: list[Tensor] = []
        mid_cache: FeatureCache = None
        before: HostCopy | None = None
        for step, features in self._run_tile(len(self.tiles) - 1, chunks, above, None):
            if self._features:
                upper = (x.to(self.device, non_blocking=True) for x in self._features[step])
                missing = features[:, :, :, :1].expand(-1, -1, -1, self._missing, -1)
                features = torch.cat((*upper, features, missing), dim=3)
                self._features[step] = []
            moments, mid_cache = self.vae.encode_mid(features, mid_cache)
            # While the next frames are read and encoded, these latents are copied.
            copying = HostCopy(self.vae.normalize(moments.chunk(2, dim=1)[0].float())[0])
            if before is not None:
                latents.append(_arrived(before))
            before = copying
        assert before is not None
        return torch.cat([*latents, _arrived(before)], dim=1)

    def _run_tile(
        self, number: int, chunks: Iterable[Frames], above: HaloOffload | None, below: HaloOffload | None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield each step and its features `[1, C, 1, rows, w]` of a tile."""
        feature_cache: FeatureCache = None
        done = 0
        for step, chunk in enumerate(chunks):
            if above is not None:
                above.prefetch(step)
            pixels = self._pixels(chunk)
            features, feature_cache = self.vae.encode_rows(pixels, feature_cache, self.tiles[number], above, below)
            del pixels
            yield step, features
            done += len(chunk)
            if self.on_frames is not None:
                self.on_frames((number * self._num_frames + done) // len(self.tiles))
        self._num_frames = done
        if above is not None:
            above.finish()

    def _pixels(self, chunk: Frames) -> Tensor:
        """Frames `[t, H, W, 3]` to pixels `[1, 3, t, H, W]` in [-1, 1], on the VAE's device in its dtype."""
        frames = torch.from_numpy(np.ascontiguousarray(chunk))
        if self.device.type == "cuda":  # otherwise the copy would wait for all work queued on the device
            frames = frames.pin_memory()
        pixels = frames.to(self.device, non_blocking=True).permute(3, 0, 1, 2)[None]
        if pixels.dtype == torch.uint8:
            pixels = pixels.float().div_(127.5).sub_(1.0)
        return pixels.to(self.dtype)


def _checked(frames: Iterable[Frames], stride: int) -> Iterator[Frames]:
    """The same chunks. Raises ValueError for one of another number of frames than 1, then `stride`."""
    expected = 1
    for chunk in frames:
        if len(chunk) != expected:
            raise ValueError(f"A chunk of frames has {len(chunk)} frames; first 1, then {stride} are needed.")
        yield chunk
        expected = stride


def _kept(chunks: Iterable[Frames], into: list[Frames]) -> Iterator[Frames]:
    """Copies of the chunks, which are also added to `into`."""
    for chunk in chunks:
        into.append(chunk.copy())
        yield into[-1]


def _arrived(copying: HostCopy) -> Tensor:
    """One step's latents `[16, 1, h, w]`, once they are on the host. Raises NonFiniteFramesError."""
    latents = copying.wait()
    if latents.is_meta:
        return torch.empty_like(latents, device="cpu")
    if not torch.isfinite(latents).all():
        raise NonFiniteFramesError("The VAE gave NaN or infinity instead of the input video's latents.", hint=HINT)
    return latents
