"""The bytes that a decode keeps between its steps, measured by running it on the meta device."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from wanduet.family.spec import VAESpec
from wanduet.kernels.vae.plain import VAE_TORCH_KERNELS, VAEKernels
from wanduet.meta.init import meta_init
from wanduet.meta.trace import Footprint, meta_empty
from wanduet.models.vae.arena import ALIGNMENT
from wanduet.models.vae.layers import FeatureCache
from wanduet.models.vae.model import WanVAE
from wanduet.models.vae.rows import WHOLE_FRAMES, Rows, Tiling
from wanduet.models.vae.tiles import Halo

# The first frame, the first step of four frames, and one with full feature caches: from then on all steps are alike.
TRACED_STEPS = 3
# A trace modifies the VAE that it runs, and traces of the same spec, dtype and kernels share one.
TRACING = threading.RLock()


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """What a decode's memory depends on: the VAE, the generated size in pixels, tiling, dtype and kernels."""

    spec: VAESpec
    height: int
    width: int
    num_frames: int
    tiling: Tiling = WHOLE_FRAMES
    dtype: torch.dtype = torch.float32
    kernels: VAEKernels = VAE_TORCH_KERNELS

    @property
    def latent_size(self) -> tuple[int, int]:
        """Rows and columns of a latent frame."""
        return self.height // self.spec.spatial_stride, self.width // self.spec.spatial_stride

    @property
    def latent_frames(self) -> int:
        """Latent frames, each of which is one step."""
        return (self.num_frames - 1) // self.spec.temporal_stride + 1

    @property
    def mid_bytes(self) -> int:
        """Bytes of one latent frame's mid features."""
        return self.spec.base_dim * self.spec.dim_mult[-1] * prod(self.latent_size) * self.dtype.itemsize

    def traced(self) -> "DecodeShape":
        """The same with no more steps than a trace needs, and without tiling: the key of cached traces."""
        frames = min(self.num_frames, (TRACED_STEPS - 1) * self.spec.temporal_stride + 1)
        return replace(self, num_frames=frames, tiling=WHOLE_FRAMES)


@dataclass(frozen=True, slots=True)
class TileBytes:
    """Bytes kept from step to step for each row tile: its layers' feature caches, and its halo for the tile below."""

    caches: tuple[int, ...]
    halos: tuple[int, ...]


def arena_bytes(shape: DecodeShape, tiles: Sequence[Rows]) -> int:
    """Peak bytes that a decode in these row tiles keeps between its steps."""
    mid, frame_major = _mid_cache_bytes(shape.traced()), shape.tiling.order == "frame"
    # Tile-major, all tiles but the first and the last are alike.
    kept = tile_cache_bytes(shape.traced(), tuple(tiles if frame_major else tiles[:3]))
    if frame_major:
        return mid + sum(kept.caches) + sum(kept.halos)
    # First the mid layers' caches alone; then each tile's, with both its halos, and the mid features of two frames.
    features = -(-shape.mid_bytes // ALIGNMENT) * ALIGNMENT
    of_tiles = zip(kept.caches, (0, *kept.halos), kept.halos, strict=False)
    return max(mid, *(sum(parts) + 2 * features for parts in of_tiles))


def compile_decode(
    spec: VAESpec, height: int, width: int, tiling: Tiling, dtype: torch.dtype, kernels: VAEKernels
) -> None:
    """Compile the kernels that a decode of this size in pixels needs, by running its first steps on the meta device."""
    frames = TRACED_STEPS * spec.temporal_stride
    arena_bytes(DecodeShape(spec, height, width, frames, tiling, dtype, kernels), tiling.tiles(height))


@lru_cache(maxsize=256)
def _mid_cache_bytes(shape: DecodeShape) -> int:
    with TRACING, torch.no_grad(), Footprint() as footprint:
        vae = meta_vae(shape.spec, shape.dtype, shape.kernels)
        vae.reuse_caches()
        z = meta_empty((1, shape.spec.z_dim, 1, *shape.latent_size), shape.dtype)
        base, feature_cache = footprint.allocated, None
        for _ in range(shape.latent_frames):
            mid: Tensor | None = None
            mid, feature_cache = vae.decode_mid(z, feature_cache)
        del mid
        return footprint.allocated - base


@lru_cache(maxsize=1024)
def tile_cache_bytes(shape: DecodeShape, tiles: tuple[Rows, ...]) -> TileBytes:
    """Bytes that each of several row tiles, one below the other, keeps. `shape`: see `DecodeShape.traced`."""
    with TRACING, torch.no_grad(), Footprint():  # its own: an enclosing Footprint must not count this
        vae = meta_vae(shape.spec, shape.dtype, shape.kernels)
        vae.reuse_caches()
        mid, _ = vae.decode_mid(meta_empty((1, shape.spec.z_dim, 1, *shape.latent_size), shape.dtype), None)
        caches: list[FeatureCache] = [None] * len(tiles)
        halos = [Halo(tile) for tile in tiles]
        for _ in range(shape.latent_frames):
            for number, wanted in enumerate(tiles):
                above = halos[number - 1] if number else None
                _, caches[number] = vae.decode_rows(mid, caches[number], wanted, above, halos[number])
    return TileBytes(tuple(map(_bytes, caches)), tuple(_bytes(list(halo.rows.values())) for halo in halos))


def _bytes(tensors: FeatureCache) -> int:
    """Bytes of all tensors in a tree, each rounded up as `Arena` does."""
    sizes = (leaf.nbytes for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


@lru_cache(maxsize=4)
def meta_vae(spec: VAESpec, dtype: torch.dtype, kernels: VAEKernels) -> WanVAE:
    """A VAE on the meta device, set up as on a device that has these kernels."""
    with meta_init():
        vae = WanVAE(spec).requires_grad_(False).to(dtype)
    with Footprint():  # for its fast rules on the meta device, and so that an enclosing Footprint does not count this
        vae.use_kernels(kernels)
        if kernels is not VAE_TORCH_KERNELS:
            vae.channels_last()
    return vae
