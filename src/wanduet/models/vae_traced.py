"""How much a decode remembers between its steps, found by running it on the meta device."""

import threading
from functools import lru_cache

import torch
from torch import Tensor

from wanduet.models.footprint import Footprint, on_meta
from wanduet.models.vae import WanVAE
from wanduet.models.vae_layers import Past
from wanduet.models.vae_rows import DecodePlan, Rows
from wanduet.models.vae_strips import Seam
from wanduet.ops.vae_fused import VAE_TORCH_KERNELS, VAEKernels
from wanduet.specs import VAESpec

# The first frame, the first step of four frames, and one with a full history: then every step is alike.
TRACED_STEPS = 3
# A trace changes the VAE that it runs on, which all traces of a kind share.
TRACING = threading.RLock()


def history_bytes(
    spec: VAESpec,
    height: int,
    width: int,
    num_frames: int,
    plan: DecodePlan,
    strips: tuple[Rows, ...],
    dtype: torch.dtype,
    kernels: VAEKernels,
) -> int:
    """Bytes of what a decode of a generated size in pixels remembers between its steps, at its fullest."""
    steps = min((num_frames - 1) // spec.temporal_stride + 1, TRACED_STEPS)
    size = (height // spec.spatial_stride, width // spec.spatial_stride)
    trunk = _trunk_kept(spec, *size, steps, dtype, kernels)
    if plan.order == "frame":
        return trunk + _strips_kept(spec, *size, strips, steps, dtype, kernels)
    # First the trunk's alone, then each strip's alone. All but the first and the last are alike.
    some = {strips[0], max(strips[1:], key=lambda strip: strip.count, default=strips[0])}
    return max(trunk, *(_strips_kept(spec, *size, (strip,), steps, dtype, kernels) for strip in some))


def compile_decode(
    spec: VAESpec, height: int, width: int, plan: DecodePlan, dtype: torch.dtype, kernels: VAEKernels
) -> None:
    """Run the first steps of such a decode on the meta device, with kernels that are compiled by that."""
    strips = plan.strips(Rows.whole(height))[:2]
    history_bytes(spec, height, width, TRACED_STEPS * spec.temporal_stride, plan, strips, dtype, kernels)


@lru_cache(maxsize=256)
def _trunk_kept(spec: VAESpec, rows: int, columns: int, steps: int, dtype: torch.dtype, kernels: VAEKernels) -> int:
    with TRACING, torch.no_grad(), Footprint() as footprint:
        vae = meta_vae(spec, dtype, kernels)
        vae.own_pasts()
        z = on_meta((1, spec.z_dim, 1, rows, columns), dtype)
        base, past = footprint.live, None
        for _ in range(steps):
            mid: Tensor | None = None
            mid, past = vae.decode_trunk(z, past)
        del mid
        return footprint.live - base


@lru_cache(maxsize=1024)
def _strips_kept(
    spec: VAESpec,
    rows: int,
    columns: int,
    strips: tuple[Rows, ...],
    steps: int,
    dtype: torch.dtype,
    kernels: VAEKernels,
) -> int:
    """Of strips one below the other."""
    with TRACING, torch.no_grad(), Footprint() as footprint:
        vae = meta_vae(spec, dtype, kernels)
        vae.own_pasts()
        mid, _ = vae.decode_trunk(on_meta((1, spec.z_dim, 1, rows, columns), dtype), None)
        del _
        base = footprint.live
        pasts: list[Past] = [None] * len(strips)
        seams = [None, *(Seam(strip) for strip in strips[:-1]), None]
        for _ in range(steps):
            for number, wanted in enumerate(strips):
                _, pasts[number] = vae.decode_rows(mid, pasts[number], wanted, *seams[number : number + 2])
        del _
        return footprint.live - base


@lru_cache(maxsize=4)
def meta_vae(spec: VAESpec, dtype: torch.dtype, kernels: VAEKernels) -> WanVAE:
    """A VAE without memory, as it would be on a device with these kernels."""
    with torch.device("meta"):
        vae = WanVAE(spec).requires_grad_(False).to(dtype)
    vae.use_kernels(kernels)
    if kernels is not VAE_TORCH_KERNELS:
        vae.channels_last()
    return vae
