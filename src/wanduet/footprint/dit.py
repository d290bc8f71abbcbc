"""Bytes that a step of the transformer needs beside weights and text, found by running it on the meta device."""

from dataclasses import replace
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from wanduet.distributed.mesh import ONE_DEVICE, Layout
from wanduet.distributed.p2p.exchange import direct_bytes
from wanduet.family.specs import TransformerSpec
from wanduet.footprint.fake_group import NobodysPeers, OneOfMany
from wanduet.kernels.dit.plain import TORCH_KERNELS
from wanduet.kernels.dit.rope import Rope
from wanduet.meta.init import meta_init
from wanduet.meta.trace import Footprint, meta_empty
from wanduet.models.dit.model import Runtime, TextContext, WanTransformer

TRACED_BLOCKS = 2  # all blocks are alike; the second shows what is kept from one to the next


# Beyond this many tokens the peak is a straight line: it is traced at two lengths and drawn on.
TRACED_TOKENS = 131072
SIDE = 32  # tokens along a frame's side in those two traces


def forward_bytes(
    spec: TransformerSpec,
    latent_shape: tuple[int, ...],
    text_len: int,
    dtype: str,
    fused: bool,
    layout: Layout = ONE_DEVICE,
    prompts: int = 1,
) -> int:
    """Peak bytes for latents `[16, T, h, w]` and so many prompts that share what they can, on each of a layout's ranks.

    `fused`: with kernels that need no memory of their own, as Triton's. What ranks exchange is counted, in whichever
    way takes more: by collectives, or in a buffer of `buffer_bytes`.
    """
    patch = spec.patch_size
    tokens = prod(size // p for size, p in zip(latent_shape[1:], patch, strict=True))
    if tokens <= TRACED_TOKENS:
        return _traced(spec, tuple(latent_shape), text_len, dtype, fused, layout, prompts)
    halves = []
    for part in (TRACED_TOKENS // 2, TRACED_TOKENS):
        grid = (part // SIDE**2, SIDE, SIDE)
        shape = (latent_shape[0], *(g * p for g, p in zip(grid, patch, strict=True)))
        halves.append(_traced(spec, shape, text_len, dtype, fused, layout, prompts))
    slope = (halves[1] - halves[0]) / (TRACED_TOKENS / 2)
    return int(halves[1] + slope * (tokens - TRACED_TOKENS))


def buffer_bytes(spec: TransformerSpec, latent_shape: tuple[int, ...], dtype: str, layout: Layout) -> int:
    """Bytes of the buffer that GPUs keep which write to each other's memory (distributed/p2p/exchange.py), beside all else."""
    if layout.ulysses == 1:
        return 0
    tokens = prod(size // p for size, p in zip(latent_shape[1:], spec.patch_size, strict=True))
    lengths = (-(-tokens // layout.sequence),) * layout.ulysses
    return direct_bytes(layout, lengths, spec.dim, getattr(torch, dtype).itemsize)


@lru_cache(maxsize=256)
def _traced(
    spec: TransformerSpec,
    latent_shape: tuple[int, ...],
    text_len: int,
    dtype: str,
    fused: bool,
    layout: Layout,
    prompts: int,
) -> int:
    kind: torch.dtype = getattr(torch, dtype)
    small = replace(spec, num_layers=TRACED_BLOCKS)
    with meta_init():
        model = WanTransformer(small).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(WanTransformer.parameter_dtype(name, kind))
    kernels = FUSED if fused else TORCH_KERNELS
    buffer = buffer_bytes(spec, latent_shape, dtype, layout)
    peaks = []
    for peers in [None] if buffer == 0 else [None, NobodysPeers(meta_empty((buffer // kind.itemsize,), kind))]:
        model.runtime = Runtime(kernels=kernels, attention=_attend, sharding=OneOfMany(layout, peers))
        peaks.append(_forward(model, latent_shape, text_len, kind, prompts) + (buffer if peers else 0))
    return max(peaks)


def _forward(
    model: WanTransformer, latent_shape: tuple[int, ...], text_len: int, kind: torch.dtype, prompts: int
) -> int:
    spec = model.spec
    heads = (1, text_len, spec.num_attention_heads, spec.attention_head_dim)
    text = tuple(meta_empty(heads, kind) for _ in range(TRACED_BLOCKS))
    shape = (1, *latent_shape)
    # The tables on the host, which are kept for the next job, are not the device's.
    host = model.prepare_rope(shape, torch.device("meta"))
    with torch.no_grad(), Footprint() as footprint:
        latents = meta_empty(shape, torch.float32)
        rope = Rope(torch.empty_like(host.cos), torch.empty_like(host.sin))
        texts = tuple(TextContext(text, text) for _ in range(prompts))
        model.forward_cfg(latents, torch.empty(1, device="meta"), texts, rope)
    return footprint.reserved


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What every fused attention allocates: its output, and the log-sum-exp in float32."""
    torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def _residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return x, y if out is None else out


def _qk_norm_rope_pair(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, num_heads: int, rope: Rope | None
) -> tuple[Tensor, Tensor]:
    return q.unflatten(-1, (num_heads, -1)), k.unflatten(-1, (num_heads, -1))


def _attend_text(q: Tensor, weight: Tensor, eps: float, keys: Tensor, values: Tensor, repeats: int) -> Tensor:
    return q


# What kernels allocate that work in one pass: their results, where those are not in place.
FUSED = replace(
    TORCH_KERNELS,
    name="fused",
    norm=_norm,
    residual_norm=_residual_norm,
    qk_norm_rope_pair=_qk_norm_rope_pair,
    text_attention=_attend_text,
)
