"""Bytes that a decode or an encode needs beside the VAE's weights, measured by running it on the meta device."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from wanduet.family.spec import VAESpec
from wanduet.kernels.vae.plain import VAE_TORCH_KERNELS
from wanduet.meta.trace import Footprint, meta_empty
from wanduet.models.vae.arena_size import TRACED_STEPS, TRACING, DecodeShape, meta_vae, tile_cache_bytes
from wanduet.models.vae.encode import encode_stream
from wanduet.models.vae.halo_offload import PIECE_BYTES, page_locked_bytes
from wanduet.models.vae.rows import WHOLE_FRAMES, Rows, split_rows
from wanduet.models.vae.stream import DecodePart, Frames, decode_stream
from wanduet.models.vae.tiles import Halo, share_decode

# Library workspaces and the allocator's pages, by bytes of a value: measured, benchmarks/memory_grid.py.
WORKSPACE_BYTES = {4: 80 * 2**20, 2: 40 * 2**20}
# What cuDNN adds where it computes all convolutions. Not measured since the allocator is simulated: an upper estimate.
CUDNN_SHARE, CUDNN_BYTES = 0.15, 130 * 2**20


@lru_cache(maxsize=1024)
def decode_bytes(shape: DecodeShape, ranks: int = 1) -> int:
    """Peak bytes of `decode_stream`, without weights, as the CUDA allocator reserves them.

    With several `ranks`, the largest peak of one of them when all are equally fast: frame-major, its rows and the halo
    around them, which takes no less than the halo rows that it receives.
    """
    spec, height, tiling, rows = shape.spec, shape.height, shape.tiling, Rows.whole(shape.height)
    latents = torch.empty(spec.z_dim, min(shape.latent_frames, TRACED_STEPS), *shape.latent_size)
    with TRACING:
        vae = meta_vae(spec, shape.dtype, shape.kernels)
        if ranks > 1:
            equal = (1.0,) * ranks
            tiles, _ = share_decode(vae.decoder.mid_layers, vae.decoder.local_layers, height, equal)
            tiling, rows = WHOLE_FRAMES, max(tiles or split_rows(rows, equal), key=lambda tile: tile.count)
        elif tiling.order == "strip":  # all tiles but the first and the last are alike
            rows = Rows(0, tiling.tiles(height)[:3][-1].stop, height)
        with Footprint() as footprint:
            for _ in decode_stream(vae, latents, tiling, part=DecodePart(rows)):
                pass
        reserved = footprint.reserved + sum(buffer.nbytes for buffer in vae.buffers())  # prepared weights
    if shape.kernels is VAE_TORCH_KERNELS:
        return _with_cudnn(reserved)
    return reserved + WORKSPACE_BYTES[shape.dtype.itemsize]


def encode_bytes(spec: VAESpec, size: tuple[int, int, int], num_tiles: int, dtype: torch.dtype) -> int:
    """Peak bytes of `encode_stream`, without weights, as the CUDA allocator reserves them.

    `size`: height and width in pixels, frames. `num_tiles`: the number of row tiles.
    """
    most = (TRACED_STEPS - 1) * spec.temporal_stride + 1
    return _encode_bytes(spec, (*size[:2], min(size[2], most)), num_tiles, dtype)


@lru_cache(maxsize=256)
def _encode_bytes(spec: VAESpec, size: tuple[int, int, int], num_tiles: int, dtype: torch.dtype) -> int:
    height, width, num_frames = size
    chunk = np.empty((spec.temporal_stride, height, width, 3), np.uint8)

    def frames() -> Iterator[Frames]:
        yield chunk[:1]
        for _ in range(num_frames // spec.temporal_stride):
            yield chunk

    with TRACING:
        vae = meta_vae(spec, dtype, VAE_TORCH_KERNELS)
        with Footprint() as footprint:
            encode_stream(vae, frames(), num_tiles)
        return _with_cudnn(footprint.reserved)


def encode_host_bytes(spec: VAESpec, size: tuple[int, int, int], num_tiles: int, dtype: torch.dtype) -> int:
    """Bytes of host memory during an encode, see `encode_bytes`: three chunks of frames (read, waiting, copied) and the
    latents twice; with several tiles also all frames, features before the mid block, and halos."""
    height, width, num_frames = size
    pixels, steps = height * width, (num_frames - 1) // spec.temporal_stride + 1
    latent_pixels = pixels // spec.spatial_stride**2
    latents = 2 * steps * spec.z_dim * latent_pixels * torch.float32.itemsize
    needed = 3 * spec.temporal_stride * pixels * 3 + latents
    if num_tiles == 1:
        return needed
    features = spec.base_dim * spec.dim_mult[-1] * latent_pixels * dtype.itemsize
    # Tensors fill at least half of a page-locked piece.
    moved = max(PIECE_BYTES, 2 * steps * (features + _encode_halo_bytes(spec, (height, width), num_tiles, dtype)))
    return needed + num_frames * pixels * 3 + moved


@lru_cache(maxsize=256)
def _encode_halo_bytes(spec: VAESpec, size: tuple[int, int], num_tiles: int, dtype: torch.dtype) -> int:
    """Bytes of the halo that a tile of an encode passes on in each step."""
    with TRACING, torch.no_grad(), Footprint():
        vae = meta_vae(spec, dtype, VAE_TORCH_KERNELS)
        first = vae.encode_tiles(size[0], num_tiles)[0]
        halo, feature_cache = Halo(first), None
        for count in (1, spec.temporal_stride):
            frames = meta_empty((1, 3, count, *size), dtype)
            _, feature_cache = vae.encode_rows(frames, feature_cache, first, None, halo)
        return sum(rows.nbytes for rows in halo.rows.values())


def _with_cudnn(reserved: int) -> int:
    return int(reserved * (1 + CUDNN_SHARE)) + CUDNN_BYTES


def decode_host_bytes(shape: DecodeShape) -> int:
    """Bytes of host memory during a decode.

    Frame-major, two buffers of frames; tile-major ("strip"), all mid features, halos and frames.
    """
    frame_bytes = shape.height * shape.width * 3
    if shape.tiling.order == "frame":
        return 2 * shape.spec.temporal_stride * frame_bytes
    kept = tile_cache_bytes(shape.traced(), shape.tiling.tiles(shape.height)[:3])
    features, steps = shape.mid_bytes, shape.latent_frames
    mid_features = -(-steps // max(1, PIECE_BYTES // features)) * page_locked_bytes(features)
    return shape.num_frames * frame_bytes + mid_features + steps * max(kept.halos) + 2 * PIECE_BYTES
