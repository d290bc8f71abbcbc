"""Bytes that a step of the transformer needs beside weights and text, found by running it on the meta device."""

from dataclasses import replace
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from wanduet.models.footprint import Footprint, on_meta
from wanduet.models.transformer import Runtime, TextContext, WanTransformer
from wanduet.ops.fused import TORCH_KERNELS
from wanduet.ops.rope import Rope
from wanduet.parallel.sharding import NoSharding
from wanduet.specs import TransformerSpec

TRACED_BLOCKS = 2  # all blocks are alike; the second shows what is kept from one to the next


# Beyond this many tokens the peak is a straight line: it is traced at two lengths and drawn on.
TRACED_TOKENS = 131072
SIDE = 32  # tokens along a frame's side in those two traces


def forward_bytes(
    spec: TransformerSpec,
    latent_shape: tuple[int, ...],
    text_len: int,
    dtype: str,
    ffn_chunk: int,
    ranks: int = 1,
    prompts: int = 1,
) -> int:
    """Peak bytes for latents `[16, T, h, w]` and so many prompts on each of `ranks` devices that share the sequence."""
    patch = spec.patch_size
    tokens = prod(size // p for size, p in zip(latent_shape[1:], patch, strict=True))
    if tokens <= TRACED_TOKENS:
        return _traced(spec, tuple(latent_shape), text_len, dtype, ffn_chunk, ranks, prompts)
    halves = []
    for part in (TRACED_TOKENS // 2, TRACED_TOKENS):
        grid = (part // SIDE**2, SIDE, SIDE)
        shape = (latent_shape[0], *(g * p for g, p in zip(grid, patch, strict=True)))
        halves.append(_traced(spec, shape, text_len, dtype, ffn_chunk, ranks, prompts))
    slope = (halves[1] - halves[0]) / (TRACED_TOKENS / 2)
    return int(halves[1] + slope * (tokens - TRACED_TOKENS))


@lru_cache(maxsize=256)
def _traced(
    spec: TransformerSpec,
    latent_shape: tuple[int, ...],
    text_len: int,
    dtype: str,
    ffn_chunk: int,
    ranks: int,
    prompts: int,
) -> int:
    kind: torch.dtype = getattr(torch, dtype)
    small = replace(spec, num_layers=TRACED_BLOCKS)
    with torch.device("meta"):
        model = WanTransformer(small).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(WanTransformer.parameter_dtype(name, kind))
    kernels = replace(TORCH_KERNELS, text_attention=_attend_text)
    model.runtime = Runtime(kernels=kernels, attention=_attend, sharding=_Share(ranks), ffn_chunk=ffn_chunk)
    heads = (1, text_len, spec.num_attention_heads, spec.attention_head_dim)
    text = tuple(on_meta(heads, kind) for _ in range(TRACED_BLOCKS))
    shape = (1, *latent_shape)
    # The tables on the host, which are kept for the next job, are not the device's.
    host = model.prepare_rope(shape, torch.device("meta"))
    with torch.no_grad(), Footprint() as footprint:
        latents = on_meta(shape, torch.float32)
        rope = Rope(torch.empty_like(host.cos), torch.empty_like(host.sin))
        texts = tuple(TextContext(text, text) for _ in range(prompts))
        model.branches(latents, torch.empty(1, device="meta"), texts, rope)
    return int(footprint.peak)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What every fused attention allocates: its output, and the log-sum-exp in float32."""
    torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _attend_text(q: Tensor, weight: Tensor, eps: float, keys: Tensor, values: Tensor, repeats: int) -> Tensor:
    """The same for the text: its output, which is no larger than q and comes when little else is there."""
    return torch.empty_like(q)


class _Share(NoSharding):
    """The first rank's part of a sequence, without any other rank."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks

    def shard_sequence(self, x: Tensor, dim: int) -> Tensor:
        """The largest part."""
        return x if self._ranks == 1 else x.narrow(dim, 0, -(-x.shape[dim] // self._ranks)).clone()

    def gather_sequence(self, x: Tensor, dim: int) -> Tensor:
        """A whole sequence, of which this part is one."""
        return x if self._ranks == 1 else torch.cat([x] * self._ranks, dim=dim)
