"""How many bytes each phase needs, from shapes alone. The planner's arithmetic; no model is loaded.

Activations are not formulas: the code itself runs on the meta device (meta/trace.py). What it does not
see, workspaces and the allocator's rounding, is added here and checked against measured peaks in
benchmarks/results.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from wanduet.distributed.mesh import ONE_DEVICE, Layout
from wanduet.family.specs import ModelSpec
from wanduet.footprint.dit import buffer_bytes, forward_bytes
from wanduet.footprint.vae import decode_bytes, decode_host_bytes
from wanduet.kernels.select import planned_vae_kernels, plans_fused_kernels
from wanduet.models.dit.model import WanTransformer
from wanduet.models.vae.model import WanVAE
from wanduet.models.vae.rows import Tiling
from wanduet.weights.safetensors import MAPPED_BYTES

Shapes = Mapping[str, tuple[int, ...]]
Size = tuple[int, int, int]  # generated height, generated width, frames

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# What the code does not see: cuBLAS's workspaces and the caching allocator's rounding.
WORKSPACE_BYTES = 56 * 2**20
# Of a frame's pixels: what x264 holds of frames that are under way in its threads (whole_job_*.json, "host_gib", by size).
VIDEO_ENCODER_BYTES = 400
# Of the host, while weights are read: what is mapped of their files at a time, float32 as they may be.
MAPPED_ITEM = 4
# Blocks on their way to or on the device beside the resident ones (accelerate/offload.py).
STREAM_BUFFERS = 2


@dataclass(frozen=True, slots=True)
class TransformerMemory:
    """Bytes of the transformer on its device."""

    total_weights: int
    weights: int  # resident weights, streaming buffers included
    text: int  # cross-attention keys and values of every prompt
    activations: int  # the largest moment of one forward
    latents: int  # latents, sampler history, velocities
    exchange: int  # of the activations, the buffer that stays between forwards, for ranks that share a sequence
    parked: int  # what stays there when it makes room for the decode: small weights, workspaces

    @property
    def peak(self) -> int:
        """Highest sum during the denoise."""
        return self.weights + self.text + self.activations + self.latents + WORKSPACE_BYTES


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """A model's spec and the shapes of its tensors (from the checkpoint's headers)."""

    spec: ModelSpec
    transformer_shapes: Shapes
    vae_shapes: Shapes

    def transformer(
        self,
        size: Size,
        dtype: str,
        texts: Sequence[int],
        resident_blocks: int,
        device: str,
        share_first: bool = True,
        layout: Layout = ONE_DEVICE,
    ) -> TransformerMemory:
        """Memory of denoising with prompts of so many positions (`text_positions`), with `resident_blocks` kept on the
        device, on each of a layout's ranks. `device` is its name, like `cuda:0`; `share_first`: see
        `models.transformer.Runtime`."""
        t, item = self.spec.transformer, DTYPE_BYTES[dtype]
        total = self.transformer_weights(dtype)
        streamed_blocks = max(0, t.num_layers - resident_blocks - STREAM_BUFFERS)
        weights = total - streamed_blocks * self._block_bytes(dtype)
        text = sum(texts) * 2 * t.num_layers * t.dim * item
        prompts, fused, shape = (
            len(texts) if share_first else 1,
            plans_fused_kernels(device),
            self.spec.latent_shape(*size),
        )
        activations = forward_bytes(t, shape, self.spec.text_len, dtype, fused, layout, prompts)
        latents, exchange = 10 * prod(shape) * 4, buffer_bytes(t, shape, dtype, layout)
        parked = total - t.num_layers * self._block_bytes(dtype) + exchange + WORKSPACE_BYTES
        return TransformerMemory(total, weights, text, activations, latents, exchange, parked)

    def transformer_weights(self, dtype: str) -> int:
        """Bytes of the whole transformer that computes in `dtype`."""
        return sum(_parameter_bytes(n, s, dtype) for n, s in self.transformer_shapes.items())

    def loading_host(self, dtype: str) -> int:
        """Bytes of the host while the transformer's weights are read, beside where they go: what is mapped of their
        files, and one tensor on its way to another dtype."""
        shapes = self.transformer_shapes.values()
        largest = max(map(prod, shapes))
        mapped = max(largest * MAPPED_ITEM, min(MAPPED_BYTES, sum(map(prod, shapes)) * MAPPED_ITEM))
        return mapped + largest * DTYPE_BYTES[dtype]

    def vae_weights(self, dtype: str) -> int:
        """Bytes of the VAE's decoder: its encoder is not loaded to make a video of a text."""
        return sum(prod(s) * DTYPE_BYTES[dtype] for name, s in self.vae_shapes.items() if WanVAE.decodes(name))

    def decode(self, size: Size, mode: Tiling, dtype: str, device: str, ranks: int = 1) -> int:
        """Bytes that decoding needs beside the weights, on a device like `cuda:0`, or on each of several that share it."""
        alone = decode_bytes(self.spec.vae, *size, mode, dtype, planned_vae_kernels(device))
        if ranks == 1:
            return alone
        # The first of them decodes in this mode should the others be lost.
        return max(alone, decode_bytes(self.spec.vae, *size, mode, dtype, planned_vae_kernels(device), ranks))

    def decode_host(self, size: Size, mode: Tiling, dtype: str, device: str) -> int:
        """Bytes of the host that decoding on a device needs, and encoding what comes of it."""
        encoder = VIDEO_ENCODER_BYTES * size[0] * size[1]
        return encoder + decode_host_bytes(self.spec.vae, *size, mode, dtype, planned_vae_kernels(device))

    def _block_bytes(self, dtype: str) -> int:
        """Bytes of one block's streamed parameters: the large products; tables and norms stay resident."""
        block = {n: s for n, s in self.transformer_shapes.items() if n.startswith("blocks.0.")}
        return sum(prod(s) * DTYPE_BYTES[dtype] for n, s in block.items() if ".to_" in n or ".ffn." in n)


def text_positions(text: str, text_len: int) -> int:
    """At most so many positions of a prompt have a key and value of their own, told before it is cut into tokens.

    UMT5's vocabulary knows the characters of all common scripts: at most a token for each (in the form its tokenizer
    gives it), four for a rare one that is spelled in bytes, some for the borders, and one that stands for all padding.
    A model whose vocabulary is smaller is small itself, and so are its keys.
    """
    characters = unicodedata.normalize("NFKC", text)
    return min(text_len, sum(1 if ord(character) < 0x10000 else 4 for character in characters) + 4)


def text_encoder_bytes(spec: ModelSpec, dtype: str, hold: Literal["resident", "streamed"]) -> int:
    """Host bytes of the text encoder: all of it, or one layer at a time with what is mapped of its files meanwhile."""
    t, item = spec.text_encoder, DTYPE_BYTES[dtype]
    inner = t.num_heads * t.d_kv
    layer = 4 * t.d_model * inner + 3 * t.d_model * t.d_ff  # parameters
    if hold == "resident":
        return (t.num_layers * layer + t.vocab_size * t.d_model) * item
    mapped = max(t.d_model * max(inner, t.d_ff) * MAPPED_ITEM, min(MAPPED_BYTES, layer * MAPPED_ITEM))
    activations = 12 * spec.text_len * max(t.d_ff, t.d_model) * 4
    return layer * item + mapped + activations


def _parameter_bytes(name: str, shape: tuple[int, ...], dtype: str) -> int:
    import torch

    held = WanTransformer.parameter_dtype(name, getattr(torch, dtype))
    return prod(shape) * held.itemsize
