"""Bytes that a decode needs beside the VAE's weights, found by running the decode on the meta device."""

from functools import lru_cache

import torch

from wanduet.family.specs import VAESpec
from wanduet.kernels.vae.plain import VAE_TORCH_KERNELS, VAEKernels
from wanduet.meta.trace import Footprint
from wanduet.models.vae.arena_size import TRACED_STEPS, TRACING, meta_vae, tile_cache_bytes
from wanduet.models.vae.halo_offload import PIECE_BYTES, page_locked_bytes
from wanduet.models.vae.rows import Rows, Tiling, split_rows
from wanduet.models.vae.stream import decode_stream
from wanduet.models.vae.tiles import share_decode

# Workspaces inside libraries, and the allocator's pages, by bytes of a value: measured, benchmarks/memory_grid.py.
WORKSPACE_BYTES = {4: 80 * 2**20, 2: 40 * 2**20}
# Of cuDNN, where it does all convolutions: not measured since the allocator is simulated, so on the safe side.
CUDNN_SHARE, CUDNN_BYTES = 0.15, 130 * 2**20


@lru_cache(maxsize=1024)
def decode_bytes(
    spec: VAESpec,
    height: int,
    width: int,
    num_frames: int,
    plan: Tiling,
    dtype: str,
    kernels: VAEKernels = VAE_TORCH_KERNELS,
    ranks: int = 1,
) -> int:
    """Peak bytes of `decode_stream` for a generated size in pixels, without weights, as the CUDA allocator holds them.

    With several `ranks`, the most that an equal one of them needs: frame-major, its rows and a halo around them, which is
    no less than what it is sent.
    """
    kind: torch.dtype = getattr(torch, dtype)
    frames = min((num_frames - 1) // spec.temporal_stride + 1, TRACED_STEPS)
    latents = torch.empty(spec.z_dim, frames, height // spec.spatial_stride, width // spec.spatial_stride)
    rows = Rows.whole(height)
    with TRACING:
        vae = meta_vae(spec, kind, kernels)
        if ranks > 1:
            equal = (1.0,) * ranks
            shares, _ = share_decode(vae.decoder.mid_layers, vae.decoder.local_layers, height, equal)
            plan, rows = Tiling(), max(shares or split_rows(rows, equal), key=lambda share: share.count)
        elif plan.order == "strip":  # all but the first and the last are alike
            rows = Rows(0, plan.strips(height)[:3][-1].stop, height)
        with Footprint() as footprint:
            for _ in decode_stream(vae, latents, plan, rows=rows):
                pass
        held = footprint.reserved + sum(buffer.nbytes for buffer in vae.buffers())  # prepared weights
    if kernels is VAE_TORCH_KERNELS:
        return int(held * (1 + CUDNN_SHARE)) + CUDNN_BYTES
    return held + WORKSPACE_BYTES[kind.itemsize]


def decode_host_bytes(
    spec: VAESpec,
    height: int,
    width: int,
    num_frames: int,
    plan: Tiling,
    dtype: str,
    kernels: VAEKernels = VAE_TORCH_KERNELS,
) -> int:
    """What waits on the host meanwhile: with strip-major the trunk's features, what a strip hands on to the next, and the
    frames of all strips."""
    if plan.order == "frame":
        return 2 * spec.temporal_stride * height * width * 3
    kind: torch.dtype = getattr(torch, dtype)
    steps = (num_frames - 1) // spec.temporal_stride + 1
    rows, columns = height // spec.spatial_stride, width // spec.spatial_stride
    features = spec.base_dim * spec.dim_mult[-1] * rows * columns * kind.itemsize
    traced, strips = min(steps, TRACED_STEPS), plan.strips(height)[:3]
    kept = tile_cache_bytes(spec, rows, columns, strips, traced, kind, kernels)
    middles = -(-steps // max(1, PIECE_BYTES // features)) * page_locked_bytes(features)
    return num_frames * height * width * 3 + middles + steps * max(kept.seams) + 2 * PIECE_BYTES
