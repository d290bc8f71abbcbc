"""Bytes that a decode needs beside the VAE's weights, found by running the decode on the meta device."""

from functools import lru_cache

import torch
from torch import Tensor

from wanduet.models.footprint import Footprint, on_meta
from wanduet.models.vae import WanVAE
from wanduet.models.vae_layers import Past
from wanduet.models.vae_rows import DecodePlan, Rows, split_rows
from wanduet.models.vae_stream import to_uint8
from wanduet.ops.vae_fused import VAE_TORCH_KERNELS, VAEKernels
from wanduet.specs import VAESpec

# The first frame, the first step of four frames, and one with a full history: then every step is alike.
TRACED_STEPS = 3


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
    """Peak bytes of `decode_stream` for a generated size in pixels, without weights and libraries' workspaces."""
    kind: torch.dtype = getattr(torch, dtype)
    steps = (num_frames - 1) // spec.temporal_stride + 1
    rows, columns = height // spec.spatial_stride, width // spec.spatial_stride
    trunk = _trunk(spec, rows, columns, min(steps, TRACED_STEPS), kind, kernels)
    strips = split_rows(Rows.whole(height), [1.0] * plan.num_strips)
    # The first strip has one border of the frame; those between two, which makes them the largest.
    first = _strip(spec, rows, columns, strips[0], min(steps, TRACED_STEPS), kind, kernels)
    other = (
        _strip(spec, rows, columns, strips[1], min(steps, TRACED_STEPS), kind, kernels) if len(strips) > 1 else first
    )
    transient = max(first.transient, other.transient)
    if plan.order == "strip":
        waiting = steps * trunk.output  # the middle's features of all frames
        return max(waiting + trunk.kept + trunk.transient, waiting + max(first.kept, other.kept) + transient)
    history = first.kept + (len(strips) - 1) * other.kept
    picture = 2 * spec.temporal_stride * height * width * 3  # uint8, this step's and the one on its way
    return trunk.kept + history + picture + max(trunk.transient, trunk.output + transient)


class _Cost:
    """Bytes of one part: what it remembers between steps, what it needs beyond that while it runs, its output."""

    def __init__(self, kept: int, transient: int, output: int) -> None:
        self.kept, self.transient, self.output = kept, transient, output


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
