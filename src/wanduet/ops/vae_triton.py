"""A convolution's input written in one pass, by Triton: what `wanduet.ops.vae_gpu` launches.

Imported lazily, only where Triton is there. For channels-last tensors, where a pixel's channels lie side by
side: one program takes some pixels of the output with all their channels, and writes past frames, zero rows,
or `silu(norm(x))`. The plain form needs seven passes over x for that, this one reads x once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton reads the annotations of a kernel's parameters itself.)

import triton
import triton.language as tl
from torch import Tensor

from wanduet.ops.devices import on_device_of

# Values a program holds: pixels x channels. More would spill registers, fewer would not hide latency.
VALUES = 8192
EPS = 1e-12  # torch.nn.functional.normalize's


@triton.jit  # type: ignore[untyped-decorator]
def _causal_input_kernel(
    x_ptr, past_ptr, gamma_ptr, out_ptr,
    x_batch, x_frame, x_row, x_column, past_batch, past_frame, past_row, past_column,
    frames, length, height, width, top, out_height, count, scale,
    C: tl.constexpr, BLOCK_C: tl.constexpr, PIXELS: tl.constexpr, HAS_PAST: tl.constexpr, HAS_NORM: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """Pixels of `out` `[B, frames + length, out_height, width, C]`, contiguous; `scale` is sqrt(C)."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < count
    column = pixel % width
    row = (pixel // width) % out_height
    frame = (pixel // (width * out_height)) % (frames + length)
    batch = pixel // (width * out_height * (frames + length))
    channel = tl.arange(0, BLOCK_C)[None, :]
    in_width = channel < C

    is_new = inside & (frame >= frames) & (row >= top) & (row < top + height)
    x_at = batch * x_batch + (frame - frames) * x_frame + (row - top) * x_row + column * x_column
    value = tl.load(x_ptr + x_at[:, None] + channel, is_new[:, None] & in_width, 0.0)
    if HAS_NORM:
        wide = value.to(tl.float32)
        length_of = tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), EPS)[:, None]
        gamma = tl.load(gamma_ptr + channel, in_width, 0.0).to(tl.float32)
        normed = wide / length_of * scale * gamma
        value = (normed * tl.sigmoid(normed)).to(value.dtype)
    if HAS_PAST:
        is_past = inside & (frame < frames)
        past_at = batch * past_batch + frame * past_frame + row * past_row + column * past_column
        before = tl.load(past_ptr + past_at[:, None] + channel, is_past[:, None] & in_width, 0.0)
        value = tl.where(is_past[:, None], before, value)
    tl.store(out_ptr + (pixel * C)[:, None] + channel, value, inside[:, None] & in_width)


def write_causal_input(
    x: Tensor, past: Tensor | None, pads: tuple[int, int], frames: int, gamma: Tensor | None, out: Tensor
) -> None:
    """See `vae_fused.causal_input`: into `out` `[B, C, frames + T, h + pads, w]`, dense and channels last. Without
    pads and frames it may be x itself."""
    _, channels, length, height, width = x.shape
    top, out_height = pads[0], pads[0] + height + pads[1]
    count = out.shape[0] * out.shape[2] * out_height * width
    block = triton.next_power_of_2(channels)
    pixels = max(1, VALUES // block)
    before = x if past is None else past
    with on_device_of(x):
        _causal_input_kernel[(triton.cdiv(count, pixels),)](
            x, before, x if gamma is None else gamma, out,
            x.stride(0), x.stride(2), x.stride(3), x.stride(4),
            before.stride(0), before.stride(2), before.stride(3), before.stride(4),
            frames, length, height, width, top, out_height, count, float(channels**0.5),
            C=channels, BLOCK_C=block, PIXELS=pixels, HAS_PAST=past is not None and frames > 0,
            HAS_NORM=gamma is not None, EPS=EPS,
        )  # fmt: skip
