"""Bytes that a decode needs beside the VAE's weights, found by running the decode on the meta device."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from wanduet.models.footprint import Footprint, on_meta
from wanduet.models.vae import WanVAE, to_uint8
from wanduet.models.vae_layers import Past
from wanduet.models.vae_rows import DecodePlan, Rows, split_rows
from wanduet.ops.vae_fused import VAE_TORCH_KERNELS, VAEKernels
from wanduet.specs import VAESpec

# The first frame, the first step of four frames, and one with a full history: then every step is alike.
TRACED_STEPS = 3
# What the allocator holds beyond what the tensors of a step take, whose sizes differ from layer to layer, and the
# workspaces of cuDNN and cuBLAS, by bytes of a value: measured, benchmarks/memory_grid.py.
FRAGMENTATION = 0.21
WORKSPACE_BYTES = {4: 130 * 2**20, 2: 105 * 2**20}
# Of the trunk, that is of the attention. In float32 its products have a workspace, which is larger for large frames.
TRUNK_WORKSPACE_BYTES, LARGE_FRAME, BYTES_FOR_PIXEL = 95 * 2**20, 14400, 17 * 2**10
# In half precision a fused kernel needs none, but leaves holes that grow faster.
TRUNK_FRAGMENTATION, TRUNK_SAVED_BYTES = 0.63, 96 * 2**20


@lru_cache(maxsize=1024)
def decode_bytes(
    spec: VAESpec,
    height: int,
    width: int,
    num_frames: int,
    plan: DecodePlan,
    dtype: str,
    kernels: VAEKernels = VAE_TORCH_KERNELS,
) -> int:
    """Peak bytes of `decode_stream` for a generated size in pixels, without weights, as the CUDA allocator holds them."""
    strips = split_rows(Rows.whole(height), [1.0] * plan.num_strips)
    parts = _Parts.of(spec, height, width, num_frames, strips, getattr(torch, dtype), kernels)
    mid, value = parts.trunk.output, getattr(torch, dtype).itemsize
    trunk = _trunk_held(parts.trunk.transient, height * width // spec.spatial_stride**2, value)
    history = parts.history(plan)
    history += sum(b.nbytes for b in _meta_vae(spec, getattr(torch, dtype), kernels).buffers())  # prepared weights
    if plan.order == "strip":  # the middle of this step, and of the one before or after it
        return history + 2 * mid + max(trunk, _held(parts.transient, value))
    picture = 2 * spec.temporal_stride * height * width * 3  # uint8, this step's and the one on its way
    return history + picture + max(trunk, _held(mid + parts.transient, value))


def _held(transient: int, value: int) -> int:
    return int(transient * (1 + FRAGMENTATION)) + WORKSPACE_BYTES[value]


def _trunk_held(transient: int, pixels: int, value: int) -> int:
    """For so many pixels of a latent frame and bytes of a value."""
    if value == 4:
        workspace = TRUNK_WORKSPACE_BYTES + max(0, pixels - LARGE_FRAME) * BYTES_FOR_PIXEL
        return int(transient * (1 + FRAGMENTATION)) + workspace
    return max(transient, int(transient * (1 + TRUNK_FRAGMENTATION)) - TRUNK_SAVED_BYTES)


def decode_host_bytes(
    spec: VAESpec, height: int, width: int, num_frames: int, plan: DecodePlan, dtype: str
) -> int:  # fmt: skip
    """What waits on the host meanwhile: with strip-major the middle's features, and the frames of all strips."""
    frames = num_frames if plan.order == "strip" else 2 * spec.temporal_stride
    pixels = frames * height * width * 3
    if plan.order == "frame":
        return pixels
    steps = (num_frames - 1) // spec.temporal_stride + 1
    rows, columns = height // spec.spatial_stride, width // spec.spatial_stride
    features = steps * spec.base_dim * spec.dim_mult[-1] * rows * columns
    return int(pixels + features * getattr(torch, dtype).itemsize)


def history_bytes(
    spec: VAESpec,
    height: int,
    width: int,
    num_frames: int,
    plan: DecodePlan,
    strips: Sequence[Rows],
    dtype: torch.dtype,
    kernels: VAEKernels,
) -> int:
    """Bytes of what such a decode remembers between its steps, at its fullest."""
    return _Parts.of(spec, height, width, num_frames, strips, dtype, kernels).history(plan)


def compile_decode(
    spec: VAESpec, height: int, width: int, plan: DecodePlan, dtype: torch.dtype, kernels: VAEKernels
) -> None:
    """Run the first steps of such a decode on the meta device, with kernels that are compiled by that."""
    strip = split_rows(Rows.whole(height), [1.0] * plan.num_strips)[0]
    _Parts.of(spec, height, width, TRACED_STEPS * spec.temporal_stride, [strip], dtype, kernels)


@dataclass(frozen=True, slots=True)
class _Cost:
    """Bytes of one part: what it remembers between steps, what it needs beyond that while it runs, its output."""

    kept: int
    transient: int
    output: int


@dataclass(frozen=True, slots=True)
class _Parts:
    """The trunk, the first strip of rows (at a border of the frame, perhaps), and the largest of `others` more."""

    trunk: _Cost
    first: _Cost
    other: _Cost
    others: int

    @classmethod
    def of(
        cls,
        spec: VAESpec,
        height: int,
        width: int,
        num_frames: int,
        strips: Sequence[Rows],
        dtype: torch.dtype,
        kernels: VAEKernels,
    ) -> "_Parts":
        steps = min((num_frames - 1) // spec.temporal_stride + 1, TRACED_STEPS)
        rows, columns = height // spec.spatial_stride, width // spec.spatial_stride
        largest = max(strips[1:], key=lambda strip: strip.count, default=strips[0])
        first, other = (_strip(spec, rows, columns, strip, steps, dtype, kernels) for strip in (strips[0], largest))
        return cls(_trunk(spec, rows, columns, steps, dtype, kernels), first, other, len(strips) - 1)

    @property
    def transient(self) -> int:
        return max(self.first.transient, self.other.transient)

    def history(self, plan: DecodePlan) -> int:
        if plan.order == "strip":  # first the trunk's alone, then each strip's alone
            return max(self.trunk.kept, self.first.kept, self.other.kept)
        return self.trunk.kept + self.first.kept + self.others * self.other.kept


@lru_cache(maxsize=256)
def _trunk(spec: VAESpec, rows: int, columns: int, steps: int, dtype: torch.dtype, kernels: VAEKernels) -> _Cost:
    vae = _meta_vae(spec, dtype, kernels)
    with torch.no_grad(), Footprint() as footprint:
        z = on_meta((1, spec.z_dim, 1, rows, columns), dtype)
        base, past = footprint.live, None
        for _ in range(steps):
            mid: Tensor | None = None
            mid, past = vae.decode_trunk(z, past)
        assert mid is not None
        output = mid.nbytes
        del mid
        kept = footprint.live - base
        return _Cost(kept, footprint.peak - base - kept, output)


@lru_cache(maxsize=1024)
def _strip(
    spec: VAESpec, rows: int, columns: int, wanted: Rows, steps: int, dtype: torch.dtype, kernels: VAEKernels
) -> _Cost:
    vae = _meta_vae(spec, dtype, kernels)
    with torch.no_grad(), Footprint() as footprint:
        mid = on_meta((1, spec.base_dim * spec.dim_mult[-1], 1, rows, columns), dtype)
        base = footprint.live
        past: Past = None
        for _ in range(steps):
            pixels, past = vae.decode_rows(mid, past, wanted)
            to_uint8(pixels)
            del pixels
        kept = footprint.live - base
        return _Cost(kept, footprint.peak - base - kept, 0)


@lru_cache(maxsize=4)
def _meta_vae(spec: VAESpec, dtype: torch.dtype, kernels: VAEKernels) -> WanVAE:
    with torch.device("meta"):
        vae = WanVAE(spec).requires_grad_(False).to(dtype)
    vae.use_kernels(kernels)
    if kernels is not VAE_TORCH_KERNELS:
        vae.channels_last()
    vae.own_pasts()
    return vae
