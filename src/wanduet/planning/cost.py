"""How long a job will take, roughly, from its floating-point work and what a device's class achieves.

The work is counted exactly; the rate is what attention and matrix products reach in practice, of the card (`cards`) or its
generation, so a prediction is good to a factor of about 1.5, which is what a choice needs.
"""

import os
from dataclasses import dataclass
from typing import Literal

from wanduet.family.specs import ModelSpec, TransformerSpec
from wanduet.models.vae.rows import Tiling
from wanduet.planning.cards import card_named
from wanduet.planning.hardware import DeviceInfo
from wanduet.request import ResolvedRequest

# TFLOP/s for each multiprocessor in bfloat16 (float16 before Ampere), reached by the whole denoise, of cards that `cards`
# does not know by name.
RATES = {
    (10, 0): 7.0, (9, 0): 4.6, (8, 9): 0.95, (8, 6): 0.62, (8, 0): 1.9, (12, 0): 1.1, (7, 5): 0.45, (7, 0): 0.9,
}  # fmt: skip
OLDER = 0.1
CPU_RATE = 0.025  # TFLOP/s a core in float32
# Of the transformer's rate, what the VAE's convolutions in float32 with TF32 reach: measured on Hopper, assumed for other cards.
HOPPER_DECODE_SHARE, DECODE_SHARE = 0.31, 0.2
# Before Ampere there is no TF32: half of what the float32 lanes of a multiprocessor can do, at 1.5 GHz. So a card without
# matrix units is far worse at denoising than at decoding. From the number of lanes (64 in Volta and Turing), not measured.
PLAIN_FLOAT32 = {(7, 0): 0.1, (0, 0): 0.19}
# TFLOP to decode one latent frame of 60x104 (480x832), shared/measured: 275 for 21.
DECODE_TFLOP_PER_LATENT_PIXEL = 275 / (21 * 60 * 104)
# Of a decode's time, what each further cut of its frames adds: 3 to 7 % at 480p, 1.5 to 3 at 720p, 1 to 2 at 1080p
# (benchmarks/results/whole_job_*.json, H100).
CUT_SHARE = 0.03
# Strip by strip, frames come at the end, and then wait for the encoder, which else works beside the decode. Pixels a second
# by which jobs took longer to write (the same files, "ours" and "smallest": 16 cores, x264).
VIDEO_RATE = 50e6
MOVING_RATE = 20e9  # bytes a second over PCIe 4 x16, page-locked
# The text encoder on the CPU: TFLOP/s a core, and bytes a second that its weights come in, from the file (page cache
# or disk) or from memory. From benchmarks/results/text_encoder.json: 0.088 s a token and 8.4 s a pass on 2 cores.
ENCODE_RATES = {"bfloat16": 0.05, "float16": 0.05, "float32": 0.02}
MOST_CORES = 32  # a prompt is too short to keep more busy
READ_RATES = {"streamed": 1.4e9, "resident": 2e10}
PROMPT_TOKENS = 80  # of a detailed prompt; the negative one is encoded once and kept


@dataclass(frozen=True, slots=True)
class Seconds:
    """Predicted seconds of each phase."""

    denoise: float
    decode: float

    @property
    def total(self) -> float:
        """Both; text and writing are hidden or small beside them."""
        return self.denoise + self.decode


def forward_flop(spec: TransformerSpec, tokens: int, text_len: int) -> float:
    """Floating-point operations of one forward: two for each multiplication and addition."""
    return product_flop(spec, tokens) + attention_flop(spec, tokens, text_len)


def product_flop(spec: TransformerSpec, tokens: int) -> float:
    """Those of the blocks' matrix products with weights: q, k, v and out of self-attention, q and out of cross-attention,
    the feed-forward. (The text's keys and values are computed once a job.)"""
    return float(spec.num_layers * 2 * tokens * spec.dim * (6 * spec.dim + 2 * spec.ffn_dim))


def attention_flop(spec: TransformerSpec, tokens: int, text_len: int) -> float:
    """Those of the blocks' scores and values, of self-attention and of cross-attention."""
    return float(spec.num_layers * 4 * tokens * spec.dim * (tokens + text_len))


def denoise_flop(request: ResolvedRequest, spec: ModelSpec) -> float:
    """Floating-point operations of all steps of a job's videos on one device.

    With guidance the first block's self-attention is the same for both prompts, and computed once.
    """
    size = (request.generated_height, request.generated_width, request.num_frames)
    t, tokens = spec.transformer, spec.num_tokens(*size)
    step = forward_flop(t, tokens, spec.text_len)
    if request.uses_guidance:
        step += step - 4 * tokens * t.dim * (2 * t.dim + tokens)  # q, k, v, out; scores and values
    return request.num_videos_per_prompt * request.num_inference_steps * step


def predict_seconds(
    request: ResolvedRequest, spec: ModelSpec, transformer: DeviceInfo, vae: DeviceInfo, ranks: int = 1
) -> Seconds:
    """For the whole job; `ranks` equal devices share the denoise and the decode."""
    denoise = denoise_flop(request, spec) / (rate(transformer) * 1e12)
    return Seconds(denoise / ranks, decode_seconds(request, spec, vae) / ranks)


def step_seconds(request: ResolvedRequest, seconds: Seconds) -> float:
    """Of one step of one video, guidance and all, of a denoise that is predicted to take so long."""
    return seconds.denoise / (request.num_videos_per_prompt * request.num_inference_steps)


def encode_seconds(spec: ModelSpec, dtype: str, hold: Literal["resident", "streamed"]) -> tuple[float, float]:
    """Of one prompt that is in no cache: seconds until the weights have passed, and core-seconds of arithmetic."""
    t = spec.text_encoder
    parameters = t.num_layers * (4 * t.d_model * t.num_heads * t.d_kv + 3 * t.d_model * t.d_ff)
    item = 4 if dtype == "float32" else 2
    return parameters * item / READ_RATES[hold], 2e-12 * parameters * PROMPT_TOKENS / ENCODE_RATES[dtype]


def decode_seconds(request: ResolvedRequest, spec: ModelSpec, vae: DeviceInfo) -> float:
    """Of all of a job's videos on one device."""
    size = (request.generated_height, request.generated_width, request.num_frames)
    return request.num_videos_per_prompt * decode_flop(spec, size) / (decode_rate(vae) * 1e12)


def cut_seconds(request: ResolvedRequest, decode: float, mode: Tiling) -> float:
    """What a decode of so many seconds, and writing what comes of it, take longer in strips."""
    pixels = request.num_videos_per_prompt * request.num_frames * request.generated_height * request.generated_width
    late = 0.0 if mode.order == "frame" else pixels / VIDEO_RATE
    return CUT_SHARE * decode * (mode.num_tiles - 1) + late


def swap_seconds(weights: int) -> float:
    """To take a transformer of so many bytes off its device for a decode, and to bring it back."""
    return 2 * weights / MOVING_RATE


def decode_flop(spec: ModelSpec, size: tuple[int, int, int]) -> float:
    """Floating-point operations of decoding a video of so many generated rows, columns and frames."""
    _, frames, rows, columns = spec.latent_shape(*size)
    width = (spec.vae.base_dim / 96) ** 2  # convolutions grow with the square of the width
    return DECODE_TFLOP_PER_LATENT_PIXEL * 1e12 * frames * rows * columns * width


def decode_rate(device: DeviceInfo) -> float:
    """TFLOP/s that the decode reaches on a device, in float32."""
    if device.is_cpu or not device.multiprocessors or device.capability >= (8, 0):
        share = HOPPER_DECODE_SHARE if device.capability == (9, 0) else DECODE_SHARE
        return rate(device) * (1.0 if device.is_cpu else share)
    lanes = PLAIN_FLOAT32[(7, 0) if device.capability >= (7, 0) else (0, 0)]
    return lanes * device.multiprocessors


def rate(device: DeviceInfo) -> float:
    """TFLOP/s that the denoise reaches on a device."""
    if device.is_cpu or not device.multiprocessors:
        return CPU_RATE * max(1, (os.cpu_count() or 2) // 2)
    if card := card_named(device.model):
        return card.rate
    exact = RATES.get(device.capability)
    if exact is None:
        newer = [value for generation, value in sorted(RATES.items()) if generation <= device.capability]
        exact = newer[-1] if newer else OLDER
    return exact * device.multiprocessors
