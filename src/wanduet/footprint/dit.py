"""Bytes that a forward of the transformer needs beside weights and text, measured by running it on the meta device."""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from wanduet.distributed.mesh import ONE_DEVICE, Layout
from wanduet.distributed.p2p.exchange import p2p_buffer_bytes
from wanduet.family.spec import TransformerSpec
from wanduet.footprint.fake_group import FakePeerMemory, TracedSharding
from wanduet.kernels.attention.backends import AttentionFn
from wanduet.kernels.attention.call import AttentionCall
from wanduet.kernels.attention.sparse import Blocks
from wanduet.kernels.attention.trained import QKV, TrainedSparse
from wanduet.kernels.dit.plain import TORCH_KERNELS, Norm, QKNorm
from wanduet.kernels.dit.quantized import TORCH_QUANTIZED, Quantize, QuantizedKernels
from wanduet.kernels.dit.rope import Rope
from wanduet.meta.init import meta_init
from wanduet.meta.trace import Footprint, meta_empty
from wanduet.models.dit.block import Runtime
from wanduet.models.dit.model import TextContext, WanTransformer
from wanduet.models.dit.quantizer import Quantizer

TRACED_BLOCKS = 2  # all blocks are alike; the second shows what is kept between blocks
# Beyond this many tokens the peak is linear in them: it is traced at two lengths and extrapolated.
TRACED_TOKENS = 131072
SIDE = 32  # tokens along a frame's side in those two traces


@dataclass(frozen=True, slots=True)
class ForwardShape:
    """What a forward's memory depends on.

    Latents `[16, T, h, w]`, `text_len` positions of text, the large products' `dtype` by name; `prompts` in one
    `forward_cfg`; the ranks' `layout`. `fused`: with kernels that need no memory of their own, as Triton's.
    `coded_channels`: of a head's queries and keys, written as 8-bit codes for attention. `quantize`: the format of the
    large products' operands, as in a request, and whether its kernels are `fused_quantized`.
    """

    spec: TransformerSpec
    latent_shape: tuple[int, ...]
    text_len: int
    dtype: str
    fused: bool
    layout: Layout = ONE_DEVICE
    prompts: int = 1
    coded_channels: int = 0
    quantize: Quantize = "off"
    fused_quantized: bool = True

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype by its name."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def tokens(self) -> int:
        """The length of the whole sequence."""
        return prod(size // p for size, p in zip(self.latent_shape[1:], self.spec.patch_size, strict=True))


def forward_bytes(shape: ForwardShape) -> int:
    """Peak bytes of a forward on each rank, without weights and text.

    Includes what ranks exchange, in the way that takes more memory: by collectives, or in a buffer of `buffer_bytes`.
    """
    if shape.tokens <= TRACED_TOKENS:
        return _traced(shape)
    peaks = []
    for tokens in (TRACED_TOKENS // 2, TRACED_TOKENS):
        grid = (tokens // SIDE**2, SIDE, SIDE)
        latent_shape = (shape.latent_shape[0], *(g * p for g, p in zip(grid, shape.spec.patch_size, strict=True)))
        peaks.append(_traced(replace(shape, latent_shape=latent_shape)))
    slope = (peaks[1] - peaks[0]) / (TRACED_TOKENS / 2)
    return int(peaks[1] + slope * (shape.tokens - TRACED_TOKENS))


def buffer_bytes(spec: TransformerSpec, latent_shape: tuple[int, ...], dtype: str, layout: Layout) -> int:
    """Bytes of the buffer that each rank keeps if GPUs write to each other's memory (distributed/p2p/exchange.py).

    For latents `[16, T, h, w]`. Zero without Ulysses.
    """
    if layout.ulysses == 1:
        return 0
    tokens = prod(size // p for size, p in zip(latent_shape[1:], spec.patch_size, strict=True))
    lengths = (-(-tokens // layout.sequence),) * layout.ulysses
    return p2p_buffer_bytes(layout, lengths, spec.dim, getattr(torch, dtype).itemsize)


@lru_cache(maxsize=256)
def _traced(shape: ForwardShape) -> int:
    dtype, layout = shape.torch_dtype, shape.layout
    small = replace(shape.spec, num_layers=TRACED_BLOCKS)
    if layout.ring > 1:  # refused for other attention, but planned first
        small = replace(small, attention="dense")
    with meta_init():
        model = WanTransformer(small).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(WanTransformer.parameter_dtype(name, dtype))
    kernels = FUSED if shape.fused else TORCH_KERNELS
    buffer = buffer_bytes(shape.spec, shape.latent_shape, shape.dtype, layout)
    peaks = []
    by_collectives = buffer == 0 or shape.spec.attention != "dense"
    for peers in [None] if by_collectives else [None, FakePeerMemory(meta_empty((buffer // dtype.itemsize,), dtype))]:
        sharding, attention = TracedSharding(layout, peers), _attention(shape.coded_channels)
        model.runtime = Runtime(
            kernels=kernels,
            attention=attention,
            sharding=sharding,
            quantizer=_quantizer(shape),
            trained=_TracedSparse(),
        )
        peaks.append(_forward(model, shape) + (buffer if peers else 0))
    return max(peaks)


def _forward(model: WanTransformer, shape: ForwardShape) -> int:
    heads = (1, shape.text_len, shape.spec.num_attention_heads, shape.spec.attention_head_dim)
    text = tuple(meta_empty(heads, shape.torch_dtype) for _ in range(TRACED_BLOCKS))
    batched = (1, *shape.latent_shape)
    # The cached tables in host memory are no part of the device's memory.
    host = model.prepare_rope(batched, torch.device("meta"))
    with torch.no_grad(), Footprint() as footprint:
        latents = meta_empty(batched, torch.float32)
        rope = Rope(torch.empty_like(host.cos), torch.empty_like(host.sin))
        texts = tuple(TextContext(text, text) for _ in range(shape.prompts))
        model.forward_cfg(latents, torch.empty(1, device="meta"), texts, rope)
    return footprint.reserved


def _attention(coded_channels: int) -> AttentionFn:
    def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """Allocates what every fused attention does, its output and the log-sum-exp in float32, and codes with two factors
        a row."""
        codes = [torch.empty((*x.shape[:3], coded_channels), dtype=torch.int8, device=q.device) for x in (q, k)]
        codes += [torch.empty((*x.shape[:3], 2 if coded_channels else 0), device=q.device) for x in (q, k)]
        torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)

    return attend


class _TracedSparse(TrainedSparse):
    """Allocates what every kernel of listed attention does; `kernels.attention.trained.trained_bytes` counts the rest."""

    def vsa(
        self, qkv: QKV, tiles: Blocks, share: float, dense: AttentionFn, call: AttentionCall
    ) -> tuple[Tensor, Tensor]:
        """Return both parts, not initialised."""
        batch, _, heads, head_dim = qkv[0].shape
        return dense(*qkv, call), torch.empty(batch, heads, len(tiles.starts) - 1, head_dim, device="meta")

    def sla(
        self, qkv: QKV, projection: tuple[Tensor, Tensor], share: float, dense: AttentionFn, call: AttentionCall
    ) -> Tensor:
        """Return the output, not initialised."""
        return dense(*qkv, call)


def _quantizer(shape: ForwardShape) -> Quantizer | None:
    if shape.quantize == "off":
        return None
    return Quantizer(shape.quantize, FUSED_QUANTIZED if shape.fused_quantized else TORCH_QUANTIZED)


def _norm(x: Tensor, parameters: Norm, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def _residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, norm: Norm, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return x, y if out is None else out


def _qk_norm_rope_pair(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, norm: QKNorm) -> tuple[Tensor, Tensor]:
    return q.unflatten(-1, (norm.num_heads, -1)), k.unflatten(-1, (norm.num_heads, -1))


def _attend_text(q: Tensor, weight: Tensor, eps: float, keys: Tensor, values: Tensor, repeats: int) -> Tensor:
    return q


# Kernels that work in one pass allocate their results only, unless they work in place.
FUSED = replace(
    TORCH_KERNELS,
    name="fused",
    norm=_norm,
    residual_norm=_residual_norm,
    qk_norm_rope_pair=_qk_norm_rope_pair,
    text_attention=_attend_text,
)
FUSED_QUANTIZED = QuantizedKernels("fused", *4 * (lambda *_: None,))  # all write into memory that is passed
