"""Predicts the seconds of a job from its floating-point operations and the rate of its devices.

Operations are counted exactly. The rate is what attention and matrix products reach in practice on the card (`cards`)
or its generation. A prediction is therefore accurate to a factor of about 1.5, which is enough to choose between
settings.
"""

import os
from dataclasses import dataclass
from typing import Literal

from wanduet.accelerate.low_res import LowRes
from wanduet.accelerate.skipped_steps import Forwards
from wanduet.family.sparsity import first_sparse_step, kept_share, own_share
from wanduet.family.spec import ModelSpec, TransformerSpec
from wanduet.footprint.phases import text_compute_dtype
from wanduet.models.vae.rows import Tiling
from wanduet.planning.cards import card_named
from wanduet.planning.hardware import DeviceInfo
from wanduet.request import ResolvedRequest

# TFLOP/s of one multiprocessor in bfloat16 (float16 before Ampere) over the whole denoise, by compute capability, for
# cards that the table in `cards` lacks.
RATES = {
    (10, 0): 7.0, (9, 0): 4.6, (8, 9): 0.95, (8, 6): 0.62, (8, 0): 1.9, (12, 0): 1.1, (7, 5): 0.45, (7, 0): 0.9,
}  # fmt: skip
OLDER = 0.1
CPU_RATE = 0.025  # TFLOP/s a core in float32
# Share of the transformer's rate that the VAE's float32 convolutions reach with TF32. Measured on Hopper, assumed for
# other cards.
HOPPER_DECODE_SHARE, DECODE_SHARE = 0.31, 0.2
# TFLOP/s of one multiprocessor before Ampere, which has no TF32: half the peak of its float32 lanes at 1.5 GHz. So a
# card without matrix units is far slower at denoising than at decoding. From the number of lanes (64 in Volta and
# Turing), not measured.
PLAIN_FLOAT32 = {(7, 0): 0.1, (0, 0): 0.19}
# Share of a float32 decode's time that a decode in bfloat16 takes, on GPUs with bfloat16 matrix units. Measured: 0.57 to 0.59
# on an H100 at 480p, 720p and 1080p (benchmarks/results/whole_job_*.json); assumed for other cards.
HALF_DECODE_SHARE = 0.58
# TFLOP to decode one latent pixel. Measured: 275 for 21 latent frames of 60x104 (480x832).
DECODE_TFLOP_PER_LATENT_PIXEL = 275 / (21 * 60 * 104)
# Time to encode a video, as a share of that to decode it. On a CPU as many operations are counted, with Wan2.1's VAE. A GPU
# encodes with plain kernels: measured on an H200 at 480p, reading the file included (benchmarks/results/variants.json).
ENCODE_SHARE_CPU, ENCODE_SHARE_GPU = 0.6, 1.2
# Share of the decode's time that each further row tile adds: 3 to 7 % at 480p, 1.5 to 3 at 720p, 1 to 2 at 1080p
# (benchmarks/results/whole_job_*.json, H100).
CUT_SHARE = 0.03
# In order "strip" all frames are complete only at the end of the decode; only then does the video encoder start, which
# otherwise runs in parallel to the decode. Pixels a second at which it then delays the job (the same files, "ours" and
# "smallest": 16 cores, x264).
VIDEO_RATE = 50e6
# How many times as fast 8-bit products are, with quantizing their operands, in fp8 with exact sums and in int8. Measured on
# an H200 (benchmarks/results/products_8bit.json).
QUANTIZED_SPEED = 1.15
# How many times as fast self-attention in 8 bits is as exact attention, by compute capability, where both were measured:
# beside flash-attn-4 at 32,760 tokens on an H200 (benchmarks/results/attention_8bit.json).
ATTENTION_SPEED = {(9, 0): {"int8": 423.0 / 690.1, "int8-fast": 520.5 / 690.1}}
MOVING_RATE = 20e9  # bytes a second over PCIe 4 x16, from page-locked memory
# The text encoder on the CPU: TFLOP/s of one core, and bytes a second at which its weights are read, from the file
# (page cache or disk) or from memory. From benchmarks/results/text_encoder.json: 0.088 s a token and 8.4 s a pass on 2
# cores.
ENCODE_RATES = {"bfloat16": 0.05, "float16": 0.05, "float32": 0.02}
MOST_CORES = 32  # a prompt has too few tokens to occupy more
READ_RATES = {"streamed": 1.4e9, "resident": 2e10}
PROMPT_TOKENS = 80  # of a detailed prompt; the negative prompt is encoded once and cached


@dataclass(frozen=True, slots=True)
class Seconds:
    """Predicted seconds of each phase; `encode`: of encoding an input video. `step`: of one step of one video in which
    nothing is skipped."""

    denoise: float
    decode: float
    encode: float = 0.0
    step: float = 0.0

    @property
    def total(self) -> float:
        """All phases; encoding the text and writing the video overlap with them or are small."""
        return self.encode + self.denoise + self.decode


def forward_flop(spec: TransformerSpec, tokens: int, text_len: int) -> float:
    """Return the floating-point operations of one forward pass; a multiplication with its addition counts as two."""
    return product_flop(spec, tokens) + attention_flop(spec, tokens, text_len)


def product_flop(spec: TransformerSpec, tokens: int) -> float:
    """Return the operations of the blocks' matrix products with weights: q, k, v and out of self-attention, q and
    out of cross-attention, the feed-forward. The text's keys and values are not included: they are computed once a
    job."""
    return float(spec.num_layers * 2 * tokens * spec.dim * (6 * spec.dim + 2 * spec.ffn_dim))


def attention_flop(spec: TransformerSpec, tokens: int, text_len: int) -> float:
    """Return the operations of the blocks' attention scores and weighted values, in self- and cross-attention."""
    return float(spec.num_layers * 4 * tokens * spec.dim * (tokens + text_len))


def denoise_flop(request: ResolvedRequest, spec: ModelSpec) -> float:
    """Return the floating-point operations of all denoising steps of all videos of a job on one device, predicted if
    steps are skipped (`accelerate.skipped_steps`), and on average if steps are sparse. Steps at a lower resolution have
    fewer.

    With guidance, the first block's self-attention is the same for both prompts and counts once.
    """
    forwards = Forwards.of(request, spec)
    plain, guided = (step_flop(request, spec, is_guided) for is_guided in (False, True))
    flop = forwards.guided_steps * guided + forwards.plain_steps * plain
    if request.low_res_first:  # without step caches: all steps are computed
        flop = sum(step_flops(request, spec))
    return request.num_videos_per_prompt * (flop - forwards.count * sparse_flop(request, spec))


def sparse_flop(request: ResolvedRequest, spec: ModelSpec) -> float:
    """Return the floating-point operations that sparse attention leaves out of a forward, on average over all steps. The
    first block's attention is not sparse, but in transformers that are trained for it: they are sparse everywhere."""
    t, steps = spec.transformer, request.num_denoising_steps
    tokens = spec.num_tokens(request.generated_height, request.generated_width, request.num_frames)
    if t.attention != "dense":
        return 4.0 * t.num_layers * tokens * tokens * t.dim * (1 - own_share(t, request.sparse))
    left_out = 1 - kept_share(request.sparse, tokens)
    sparse_steps = request.first_step + steps - first_sparse_step(request.first_step, steps)
    return 4.0 * (t.num_layers - 1) * tokens * tokens * t.dim * left_out * sparse_steps / max(1, steps)


def step_flop(request: ResolvedRequest, spec: ModelSpec, is_guided: bool) -> float:
    """Return the floating-point operations of one computed step of one video, with guidance or without."""
    size = (request.generated_height, request.generated_width, request.num_frames)
    t, tokens = spec.transformer, spec.num_tokens(*size)
    step = forward_flop(t, tokens, spec.text_len)
    if is_guided:
        step += step - 4 * tokens * t.dim * (2 * t.dim + tokens)  # q, k, v, out; scores and values
    return step


def step_flops(request: ResolvedRequest, spec: ModelSpec) -> list[float]:
    """Return the floating-point operations of each step of the schedule of one video, if it is computed and dense."""
    low, guided, zero = LowRes.of(request, spec), request.guided_steps, request.num_zero_steps
    sizes = [request] if low is None else [request, low.apply(request)]
    flops = [[step_flop(one, spec, is_guided) for is_guided in (False, True)] for one in sizes]
    switch = 0 if low is None else low.num_steps
    return [(step >= zero) * flops[step < switch][step in guided] for step in range(request.num_inference_steps)]


def predict_seconds(
    request: ResolvedRequest,
    spec: ModelSpec,
    transformer: DeviceInfo,
    vae: DeviceInfo,
    ranks: int = 1,
    vae_dtype: str = "float32",
) -> Seconds:
    """Predict the seconds of a whole job; `ranks` equal devices share the denoise and the decode, one encodes."""
    per_second = rate(transformer) * 1e12
    saved = 0.0  # share of the time
    if request.quantize != "off" and not transformer.is_cpu:
        saved += _quantized_share(request, spec) * (1 - 1 / QUANTIZED_SPEED)
    if (times := attention_speed(request, transformer)) is not None:
        saved += _attention_share(request, spec) * (1 - 1 / times)
    per_second /= 1 - saved
    denoise, step = denoise_flop(request, spec), step_flop(request, spec, request.uses_guidance)
    encode = video_encode_seconds(request, spec, vae) if request.uses_input else 0.0
    decode = decode_seconds(request, spec, vae, vae_dtype) / ranks
    return Seconds(denoise / per_second / ranks, decode, encode, step / per_second / ranks)


def _quantized_share(request: ResolvedRequest, spec: ModelSpec) -> float:
    """Return the share of a forward's operations that products in 8 bits have (models/dit/quantizer.py)."""
    size = (request.generated_height, request.generated_width, request.num_frames)
    t, tokens = spec.transformer, spec.num_tokens(*size)
    cross = t.num_layers * 2 * tokens * t.dim * 2 * t.dim
    return (product_flop(t, tokens) - cross) / forward_flop(t, tokens, spec.text_len)


def attention_speed(request: ResolvedRequest, transformer: DeviceInfo) -> float | None:
    """Return how many times as fast a request's attention in 8 bits is as exact attention on a device; None if the request has
    none, or it was not measured on such a device."""
    return (
        None if transformer.is_cpu else ATTENTION_SPEED.get(transformer.capability, {}).get(request.quantize_attention)
    )


def _attention_share(request: ResolvedRequest, spec: ModelSpec) -> float:
    """Return the share of a forward's operations that self-attention has, without what sparse attention leaves out."""
    size = (request.generated_height, request.generated_width, request.num_frames)
    t, tokens = spec.transformer, spec.num_tokens(*size)
    left_out = sparse_flop(request, spec)
    return (attention_flop(t, tokens, 0) - left_out) / (forward_flop(t, tokens, spec.text_len) - left_out)


def step_seconds(request: ResolvedRequest, seconds: Seconds) -> float:
    """Return the seconds of one step of one video, of those that take longest, from the job's predicted `seconds`."""
    return max(seconds.step, seconds.denoise / (request.num_videos_per_prompt * max(1, request.num_denoising_steps)))


def encode_seconds(spec: ModelSpec, dtype: str, residency: Literal["resident", "streamed"]) -> tuple[float, float]:
    """Predict the encoding of an uncached prompt: seconds to read the weights, and core-seconds of arithmetic."""
    t = spec.text_encoder
    parameters = t.num_layers * (4 * t.d_model * t.num_heads * t.d_kv + 3 * t.d_model * t.d_ff)
    item = 4 if dtype == "float32" else 2
    return parameters * item / READ_RATES[residency], 2e-12 * parameters * PROMPT_TOKENS / ENCODE_RATES[
        text_compute_dtype(dtype)
    ]


def decode_seconds(request: ResolvedRequest, spec: ModelSpec, vae: DeviceInfo, dtype: str = "float32") -> float:
    """Predict the seconds to decode all videos of a job on one device, in a dtype by name."""
    size = (request.generated_height, request.generated_width, request.num_frames)
    share = HALF_DECODE_SHARE if dtype != "float32" and not vae.is_cpu and vae.has_bfloat16 else 1.0
    return request.num_videos_per_prompt * share * decode_flop(spec, size) / (decode_rate(vae) * 1e12)


def video_encode_seconds(request: ResolvedRequest, spec: ModelSpec, vae: DeviceInfo) -> float:
    """Predict the seconds to encode the input video, once for all videos of a job, on one device."""
    size = (request.generated_height, request.generated_width, request.num_frames)
    share = ENCODE_SHARE_CPU if vae.is_cpu else ENCODE_SHARE_GPU
    return share * decode_flop(spec, size) / (decode_rate(vae) * 1e12)


def cut_seconds(request: ResolvedRequest, decode: float, mode: Tiling) -> float:
    """Return the seconds that row tiles (`mode`) add to a decode of `decode` seconds and to writing the video."""
    pixels = request.num_videos_per_prompt * request.num_frames * request.generated_height * request.generated_width
    late = 0.0 if mode.order == "frame" else pixels / VIDEO_RATE
    return CUT_SHARE * decode * (mode.num_tiles - 1) + late


def swap_seconds(weights: int) -> float:
    """Return the seconds to move a transformer of `weights` bytes off its device for a decode, and back."""
    return 2 * weights / MOVING_RATE


def decode_flop(spec: ModelSpec, size: tuple[int, int, int]) -> float:
    """Return the floating-point operations to decode a video. `size`: generated height and width in pixels, frames."""
    _, frames, rows, columns = spec.latent_shape(*size)
    width = (spec.vae.base_dim / 96) ** 2  # convolutions grow with the square of the width
    return DECODE_TFLOP_PER_LATENT_PIXEL * 1e12 * frames * rows * columns * width


def decode_rate(device: DeviceInfo) -> float:
    """Return the TFLOP/s that the decode reaches on a device, in float32."""
    if device.is_cpu or not device.multiprocessors or device.capability >= (8, 0):
        share = HOPPER_DECODE_SHARE if device.capability == (9, 0) else DECODE_SHARE
        return rate(device) * (1.0 if device.is_cpu else share)
    lanes = PLAIN_FLOAT32[(7, 0) if device.capability >= (7, 0) else (0, 0)]
    return lanes * device.multiprocessors


def rate(device: DeviceInfo) -> float:
    """Return the TFLOP/s that the denoise reaches on a device."""
    if device.is_cpu or not device.multiprocessors:
        return CPU_RATE * max(1, (os.cpu_count() or 2) // 2)
    if card := card_named(device.model):
        return card.rate
    exact = RATES.get(device.capability)
    if exact is None:
        newer = [value for generation, value in sorted(RATES.items()) if generation <= device.capability]
        exact = newer[-1] if newer else OLDER
    return exact * device.multiprocessors
