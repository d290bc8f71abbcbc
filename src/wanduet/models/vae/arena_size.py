"""How much a decode remembers between its steps, found by running it on the meta device."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from wanduet.family.specs import VAESpec
from wanduet.kernels.vae.plain import VAE_TORCH_KERNELS, VAEKernels
from wanduet.meta.init import meta_init
from wanduet.meta.trace import Footprint, meta_empty
from wanduet.models.vae.arena import ALIGNMENT
from wanduet.models.vae.layers import FeatureCache
from wanduet.models.vae.model import WanVAE
from wanduet.models.vae.rows import Rows, Tiling
from wanduet.models.vae.tiles import Halo

# The first frame, the first step of four frames, and one with a full history: then every step is alike.
TRACED_STEPS = 3
# A trace changes the VAE that it runs on, which all traces of a kind share.
TRACING = threading.RLock()


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes that are remembered from step to step, for each strip of a frame: its layers' pasts, and what it keeps for
    the strip below."""

    pasts: tuple[int, ...]
    seams: tuple[int, ...]


def arena_bytes(
    spec: VAESpec,
    height: int,
    width: int,
    num_frames: int,
    plan: Tiling,
    strips: Sequence[Rows],
    dtype: torch.dtype,
    kernels: VAEKernels,
) -> int:
    """Bytes of what a decode of a generated size in pixels remembers between its steps, at its fullest."""
    steps = min((num_frames - 1) // spec.temporal_stride + 1, TRACED_STEPS)
    size = (height // spec.spatial_stride, width // spec.spatial_stride)
    trunk = _trunk_kept(spec, *size, steps, dtype, kernels)
    # Strip by strip, all but the first and the last are alike.
    kept = tile_cache_bytes(spec, *size, tuple(strips if plan.order == "frame" else strips[:3]), steps, dtype, kernels)
    if plan.order == "frame":
        return trunk + sum(kept.pasts) + sum(kept.seams)
    # First the trunk's alone, then each strip's, with what it is handed, what it hands on, and two frames' features.
    features = -(-spec.base_dim * spec.dim_mult[-1] * prod(size) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    strip = zip(kept.pasts, (0, *kept.seams), kept.seams, strict=False)
    return max(trunk, *(sum(parts) + 2 * features for parts in strip))


def compile_decode(
    spec: VAESpec, height: int, width: int, plan: Tiling, dtype: torch.dtype, kernels: VAEKernels
) -> None:
    """Run the first steps of such a decode on the meta device, with kernels that are compiled by that."""
    frames = TRACED_STEPS * spec.temporal_stride
    arena_bytes(spec, height, width, frames, plan, plan.strips(height), dtype, kernels)


@lru_cache(maxsize=256)
def _trunk_kept(spec: VAESpec, rows: int, columns: int, steps: int, dtype: torch.dtype, kernels: VAEKernels) -> int:
    with TRACING, torch.no_grad(), Footprint() as footprint:
        vae = meta_vae(spec, dtype, kernels)
        vae.reuse_caches()
        z = meta_empty((1, spec.z_dim, 1, rows, columns), dtype)
        base, past = footprint.allocated, None
        for _ in range(steps):
            mid: Tensor | None = None
            mid, past = vae.decode_mid(z, past)
        del mid
        return footprint.allocated - base


@lru_cache(maxsize=1024)
def tile_cache_bytes(
    spec: VAESpec,
    rows: int,
    columns: int,
    strips: tuple[Rows, ...],
    steps: int,
    dtype: torch.dtype,
    kernels: VAEKernels,
) -> Kept:
    """What strips one below the other remember, of latents of so many rows and columns."""
    with TRACING, torch.no_grad(), Footprint():  # one of its own: it is no part of what is being traced around it
        vae = meta_vae(spec, dtype, kernels)
        vae.reuse_caches()
        mid, _ = vae.decode_mid(meta_empty((1, spec.z_dim, 1, rows, columns), dtype), None)
        pasts: list[FeatureCache] = [None] * len(strips)
        seams = [Halo(strip) for strip in strips]
        for _ in range(steps):
            for number, wanted in enumerate(strips):
                above = seams[number - 1] if number else None
                _, pasts[number] = vae.decode_rows(mid, pasts[number], wanted, above, seams[number])
    return Kept(tuple(map(_bytes, pasts)), tuple(_bytes(list(seam.rows.values())) for seam in seams))


def _bytes(tensors: FeatureCache) -> int:
    """Of all tensors in a tree of them, each rounded up as `Arena` does."""
    sizes = (leaf.nbytes for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


@lru_cache(maxsize=4)
def meta_vae(spec: VAESpec, dtype: torch.dtype, kernels: VAEKernels) -> WanVAE:
    """A VAE without memory, as it would be on a device with these kernels."""
    with meta_init():
        vae = WanVAE(spec).requires_grad_(False).to(dtype)
    with Footprint():  # for its quick answers on the meta device; and it is no part of what is being traced around it
        vae.use_kernels(kernels)
        if kernels is not VAE_TORCH_KERNELS:
            vae.channels_last()
    return vae
