"""The bytes that each phase of a job needs, from shapes alone, for the planner; no model is loaded.

Activations are measured by running the code itself on the meta device (meta/trace.py). What that does not count,
library workspaces and the allocator's rounding, is added here, and checked against measured peaks in
benchmarks/results.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch

from wanduet.config import Weights
from wanduet.distributed.mesh import ONE_DEVICE, Layout
from wanduet.family.sparsity import ALL, block_for, own_share, tiles_of
from wanduet.family.spec import ModelSpec
from wanduet.footprint.dit import ForwardShape, buffer_bytes, forward_bytes
from wanduet.footprint.vae import decode_bytes, decode_host_bytes, encode_bytes, encode_host_bytes
from wanduet.kernels.attention.backends import coded_channels
from wanduet.kernels.attention.choose import Shape
from wanduet.kernels.attention.sparse_steps import sparse_bytes
from wanduet.kernels.attention.trained import trained_bytes
from wanduet.kernels.dit.quantized import INT_MM_TOKENS, Quantize
from wanduet.kernels.dit.weight import FORMATS, WeightFormat, format_of
from wanduet.kernels.select import QUANTIZED, TRITON, planned_vae_kernels, plans_triton
from wanduet.models.dit.model import WanTransformer
from wanduet.models.vae.arena_size import DecodeShape
from wanduet.models.vae.model import WanVAE
from wanduet.models.vae.rows import Tiling
from wanduet.weights.safetensors import MAPPED_BYTES

Shapes = Mapping[str, tuple[int, ...]]
Size = tuple[int, int, int]  # generated height and width in pixels, frames

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Not counted on the meta device: cuBLAS's workspaces and the caching allocator's rounding.
WORKSPACE_BYTES = 56 * 2**20
# Per pixel of a frame: the buffers of two x264 encoders (media/segments.py). Measured: 480, on noise, at 480p and 1080p.
VIDEO_ENCODER_BYTES = 600
# Bytes per parameter of the part of a weights file that is mapped while it is read: files may be float32.
MAPPED_ITEM = 4
# Device buffers for streamed blocks, beside the resident ones (accelerate/offload.py).
STREAM_BUFFERS = 2


@dataclass(frozen=True, slots=True)
class TransformerMemory:
    """Bytes of the transformer on its device, by purpose."""

    total_weights: int
    weights: int  # resident weights, streaming buffers included
    text: int  # cross-attention keys and values of every prompt
    activations: int  # peak of one forward
    latents: int  # latents, sampler history, velocities, what a step cache keeps
    exchange: int  # part of the activations: the buffer kept between forwards by ranks that share a sequence
    swapped_out: (
        int  # what stays on the device while the transformer is swapped out for the decode: small weights, workspaces
    )

    @property
    def peak(self) -> int:
        """Peak bytes during the denoise."""
        return self.weights + self.text + self.activations + self.latents + WORKSPACE_BYTES


@dataclass(frozen=True, slots=True)
class DenoiseShape:
    """What is denoised: videos of `size`, in `dtype` by name, on each rank of a layout.

    `texts`: the positions of each prompt of a rank, see `text_positions`. `kept_latents`: the tensors of the latents' size
    that a step cache keeps. `sparse`, `quantize`: see `GenerationRequest`.
    """

    size: Size
    dtype: str
    texts: Sequence[int]
    layout: Layout = ONE_DEVICE
    kept_latents: int = 0
    sparse: float = ALL
    quantize: Quantize = "off"


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """Predicts the memory of a model from its spec and the shapes of its tensors (from the checkpoint's headers).

    Dtypes are given by name ("float32", "bfloat16", "float16"), devices as "cpu" or "cuda:0". `weights`: the format of the
    transformer's matrices, `attention`: the attention back end, both as in `EngineConfig`.
    """

    spec: ModelSpec
    transformer_shapes: Shapes
    vae_shapes: Shapes
    weights: Weights = "auto"
    attention: str = "auto"

    def transformer(
        self, denoise: DenoiseShape, resident_blocks: int, device: str, share_first: bool = True
    ) -> TransformerMemory:
        """Memory of denoising on each of a layout's ranks, with `resident_blocks` of the blocks kept on the device.

        `share_first`: see `models.dit.block.Runtime`.
        """
        dtype, texts, layout = denoise.dtype, denoise.texts, denoise.layout
        t, item = self.spec.transformer, DTYPE_BYTES[dtype]
        total = self.transformer_weights(dtype)
        streamed_blocks = max(0, t.num_layers - resident_blocks - STREAM_BUFFERS)
        weights = total - streamed_blocks * self._block_bytes(dtype)
        text = sum(texts) * 2 * t.num_layers * t.dim * item
        prompts, shape = len(texts) if share_first and layout.cfg == 1 else 1, self.spec.latent_shape(*denoise.size)
        coded = coded_channels(self.attention, t.attention_head_dim)
        fused = plans_triton(TRITON, device)
        forward = ForwardShape(t, shape, self.spec.text_len, dtype, fused, layout, prompts, coded)
        if denoise.quantize != "off":
            forward = replace(forward, quantize=denoise.quantize, fused_quantized=plans_triton(QUANTIZED, device))
        activations = forward_bytes(forward)
        if denoise.quantize == "int8" and torch.device(device).type == "cuda":
            activations += INT_MM_TOKENS * max(3 * t.dim, t.ffn_dim) * 4  # if that product is the fastest
        activations += self._dense_bytes(dtype) + self._sparse_bytes(denoise, device)
        latents, exchange = (10 + denoise.kept_latents) * prod(shape) * 4, buffer_bytes(t, shape, dtype, layout)
        swapped_out = total - t.num_layers * self._block_bytes(dtype) + exchange + WORKSPACE_BYTES
        return TransformerMemory(total, weights, text, activations, latents, exchange, swapped_out)

    def transformer_weights(self, dtype: str) -> int:
        """Bytes of all weights of a transformer that computes in `dtype`."""
        format = self._format(dtype)
        return sum(_parameter_bytes(n, s, dtype, format) for n, s in self.transformer_shapes.items())

    def loading_host(self, dtype: str) -> int:
        """Bytes of host memory for reading the transformer's weights, without their destination.

        The mapped part of their files, and one tensor that is converted to another dtype.
        """
        shapes = self.transformer_shapes.values()
        largest = max(map(prod, shapes))
        mapped = max(largest * MAPPED_ITEM, min(MAPPED_BYTES, sum(map(prod, shapes)) * MAPPED_ITEM))
        return mapped + largest * DTYPE_BYTES[dtype]

    def vae_weights(self, dtype: str) -> int:
        """Bytes of the VAE's decoder."""
        return sum(prod(s) * DTYPE_BYTES[dtype] for name, s in self.vae_shapes.items() if WanVAE.decodes(name))

    def vae_encoder_weights(self, dtype: str) -> int:
        """Bytes of the VAE's encoder, which is loaded only while an input video is encoded."""
        return sum(prod(s) * DTYPE_BYTES[dtype] for name, s in self.vae_shapes.items() if WanVAE.encodes(name))

    def encode(self, size: Size, num_tiles: int, dtype: str) -> int:
        """Bytes of encoding an input video in `num_tiles` row tiles on a device, without weights."""
        return encode_bytes(self.spec.vae, size, num_tiles, getattr(torch, dtype))

    def encode_host(self, size: Size, num_tiles: int, dtype: str) -> int:
        """Bytes of host memory for encoding an input video in `num_tiles` row tiles on a device."""
        return encode_host_bytes(self.spec.vae, size, num_tiles, getattr(torch, dtype))

    def decode(self, size: Size, tiling: Tiling, dtype: str, device: str, ranks: int = 1) -> int:
        """Bytes of decoding on a device, without weights; on each of several devices that share it, if `ranks` > 1."""
        shape = self._decode_shape(size, tiling, dtype, device)
        # If the other ranks fail, the first one decodes alone, with this tiling.
        return max(decode_bytes(shape, count) for count in {1, ranks})

    def decode_host(self, size: Size, tiling: Tiling, dtype: str, device: str) -> int:
        """Bytes of host memory for decoding on a device and encoding the video."""
        encoder = VIDEO_ENCODER_BYTES * size[0] * size[1]
        return encoder + decode_host_bytes(self._decode_shape(size, tiling, dtype, device))

    def _decode_shape(self, size: Size, tiling: Tiling, dtype: str, device: str) -> DecodeShape:
        return DecodeShape(self.spec.vae, *size, tiling, getattr(torch, dtype), planned_vae_kernels(device))

    def format_name(self, dtype: str) -> Weights:
        """Return the format of the blocks' matrices in a transformer that computes in `dtype`; "auto": in that dtype."""
        return "auto" if self._format(dtype) is None else self.weights

    def _format(self, dtype: str) -> WeightFormat | None:
        return format_of(self.weights, getattr(torch, dtype))

    def _dense_bytes(self, dtype: str) -> int:
        """Bytes of the largest matrix in `dtype`, if a product has to convert it first; one exists at a time."""
        if self._format(dtype) is None:
            return 0
        spec = self.spec.transformer
        return max(3 * spec.dim, spec.ffn_dim) * spec.dim * DTYPE_BYTES[dtype]  # q, k and v are one matrix

    def _sparse_bytes(self, denoise: DenoiseShape, device: str) -> int:
        """Bytes that sparse attention adds to a forward; the parts of ranks are rounded to whole blocks."""
        t, layout, tokens = self.spec.transformer, denoise.layout, self.spec.num_tokens(*denoise.size)
        block, heads = block_for(tokens), -(-t.num_attention_heads // layout.ulysses)
        shape = Shape(tokens, tokens, heads, t.attention_head_dim)
        if t.attention != "dense":
            frames, rows, columns = self.spec.latent_shape(*denoise.size)[1:]
            tiles = tiles_of((frames // t.patch_size[0], rows // t.patch_size[1], columns // t.patch_size[2]))
            return trained_bytes(t.attention, shape, tiles, own_share(t, denoise.sparse), device == "cpu")
        if denoise.sparse == ALL:
            return 0
        rounded = 4 * block * t.dim * DTYPE_BYTES[denoise.dtype] if layout.sequence > 1 else 0
        return sparse_bytes(shape, denoise.sparse, block, device == "cpu") + rounded

    def _block_bytes(self, dtype: str) -> int:
        """Bytes of one block's streamed parameters, those of the large products; tables and norms stay resident."""
        block = {n: s for n, s in self.transformer_shapes.items() if n.startswith("blocks.0.")}
        format = self._format(dtype)
        return sum(_parameter_bytes(n, s, dtype, format) for n, s in block.items() if ".to_" in n or ".ffn." in n)


def text_positions(text: str, text_len: int) -> int:
    """An upper bound, at most `text_len`, on the positions of a prompt that have their own key and value.

    UMT5's vocabulary contains the characters of all common scripts: at most one token for each (after its tokenizer's
    normalisation), four for a rare one that is spelled in bytes, a few at the ends, and one that stands for all
    padding. A model with a smaller vocabulary is small itself, and so are its keys.
    """
    characters = unicodedata.normalize("NFKC", text)
    return min(text_len, sum(1 if ord(character) < 0x10000 else 4 for character in characters) + 4)


def text_encoder_bytes(spec: ModelSpec, dtype: str, residency: Literal["resident", "streamed"]) -> int:
    """Bytes of host memory of the text encoder: of all layers, or of one layer and the mapped part of its file."""
    t, item, layer = spec.text_encoder, DTYPE_BYTES[text_compute_dtype(dtype)], _text_layer(spec)
    inner = t.num_heads * t.d_kv
    if residency == "resident":
        return (
            t.num_layers * _text_layer_bytes(spec, dtype)
            + t.vocab_size * t.d_model * item
            + _text_converted(spec, dtype)
        )
    mapped = max(t.d_model * max(inner, t.d_ff) * MAPPED_ITEM, min(MAPPED_BYTES, layer * MAPPED_ITEM))
    of_format = 0 if dtype in DTYPE_BYTES else _text_layer_bytes(spec, dtype) + _text_converted(spec, dtype)
    return layer * item + mapped + of_format + _text_activations(spec)


def text_device_bytes(spec: ModelSpec, dtype: str, residency: Literal["resident", "streamed"]) -> tuple[int, int]:
    """Bytes that the text encoder takes on a GPU between encodes, and in addition during one. The embedding's rows come
    from its file."""
    layer = _text_layer(spec) * DTYPE_BYTES[text_compute_dtype(dtype)]
    if residency == "resident":
        return spec.text_encoder.num_layers * _text_layer_bytes(spec, dtype), (
            2 * _text_converted(spec, dtype) + _text_activations(spec)
        )
    return 0, 2 * layer + _text_activations(spec)  # the allocator's cache may keep a layer in other sizes


def text_compute_dtype(dtype: str) -> str:
    """Return what a text encoder computes in: its dtype, or bfloat16 from matrices in 8 bits (`q8`, `fp8`)."""
    return dtype if dtype in DTYPE_BYTES else "bfloat16"


def _text_converted(spec: ModelSpec, dtype: str) -> int:
    """Bytes that a pass takes for one layer in the dtype of its products, and for a float32 matrix that is read, if
    matrices are in memory in 8 bits."""
    t = spec.text_encoder
    matrix = t.d_model * max(t.d_ff, t.num_heads * t.d_kv)
    return 0 if dtype in DTYPE_BYTES else _text_layer(spec) * DTYPE_BYTES["bfloat16"] + matrix * DTYPE_BYTES["float32"]


def _text_layer_bytes(spec: ModelSpec, dtype: str) -> int:
    """Bytes of a layer in memory."""
    if dtype in DTYPE_BYTES:
        return _text_layer(spec) * DTYPE_BYTES[dtype]
    t, inner = spec.text_encoder, spec.text_encoder.num_heads * spec.text_encoder.d_kv
    shapes = [*[(inner, t.d_model)] * 3, (t.d_model, inner), *[(t.d_ff, t.d_model)] * 2, (t.d_model, t.d_ff)]
    return sum(FORMATS[dtype].num_bytes(shape) for shape in shapes)


def _text_layer(spec: ModelSpec) -> int:
    t = spec.text_encoder
    return 4 * t.d_model * t.num_heads * t.d_kv + 3 * t.d_model * t.d_ff  # parameters


def _text_activations(spec: ModelSpec) -> int:
    return 12 * spec.text_len * max(spec.text_encoder.d_ff, spec.text_encoder.d_model) * 4


def _parameter_bytes(name: str, shape: tuple[int, ...], dtype: str, format: WeightFormat | None) -> int:
    if format is not None and WanTransformer.is_block_matrix(name):
        return format.num_bytes(shape)
    return prod(shape) * WanTransformer.parameter_dtype(name, getattr(torch, dtype)).itemsize
