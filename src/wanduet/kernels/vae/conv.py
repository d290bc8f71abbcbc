"""A causal convolution in one Triton kernel, which reads past frames, borders and residual without copying them first.

Imported lazily, only if Triton is installed. An implicit matrix product over channels-last tensors: a program takes
some pixels of one output frame and some output channels, and adds up taps x input channels in one fixed order. So a
pixel's value does not depend, to the last bit, on how the frame is divided into row tiles, and no padded copy of the
input exists.

Source of the method: implicit GEMM as in cuDNN (Chetlur et al., arXiv 1410.0759, section 3).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton reads the annotations of a kernel's parameters itself.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanduet.kernels.device import multiprocessors, shared_memory
from wanduet.kernels.precision import convolutions_use_tf32
from wanduet.kernels.vae.conv_tiles import Tile, chosen_tile, offered_tiles, width_of
from wanduet.kernels.vae.norm import EPS, launch, silu_rounded
from wanduet.kernels.vae.plain import Epilogue, Filter, uses_tf32

UNIT = 16  # values; Triton loads 16 bytes at once only if distances are known multiples of this


# Sizes and the distance to the past frames differ between row tiles; specialising on them would only add compile time.
@triton.jit(do_not_specialize=["to_past", "length", "height", "width", "out_height", "out_width", "top", "left"])  # type: ignore[untyped-decorator]
def _convolution_kernel(
    x_ptr, to_past: tl.int64, weight_ptr, bias_ptr, residual_ptr, gamma_ptr, out_ptr,
    x_batch, x_frame, x_row, x_column,
    past_batch, past_frame, past_row, past_column,
    residual_batch, residual_frame, residual_row, residual_column,
    out_batch, out_frame, out_row, out_column,
    length, height, width, out_height, out_width, top, left, norm_scale,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    UNIT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_NORM: tl.constexpr, EPS: tl.constexpr,
    TO_TF32: tl.constexpr, PRECISION: tl.constexpr, PIXELS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, DEPTH: tl.constexpr,
    SWAP: tl.constexpr, ROWS: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Compute output `[B, length, out_height, out_width, C_OUT]` of input `[B, length, height, width, C_IN]`; weight
    `[C_OUT, KT, KH, KW, C_IN]`, contiguous. `top` and `left`: padding above and before. `to_past * UNIT`: distance in
    values from the first value of x to the first of the past frames. `norm_scale`: sqrt(C_OUT)."""
    groups = tl.cdiv(C_OUT, FIRST + SECOND)
    first_channel = (tl.program_id(0) % groups) * (FIRST + SECOND)
    place = tl.program_id(0) // groups
    frame = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    if ROWS == 1:
        pixel = place * PIXELS + tl.arange(0, PIXELS)
        row = pixel // out_width
        column = pixel % out_width
    else:
        COLUMNS: tl.constexpr = PIXELS // ROWS
        across = tl.cdiv(out_width, COLUMNS)
        row = (place // across) * ROWS + tl.arange(0, PIXELS) // COLUMNS
        column = (place % across) * COLUMNS + tl.arange(0, PIXELS) % COLUMNS
    is_pixel = (row < out_height) & (column < out_width)

    x_ptr += batch * x_batch
    to_past = to_past * UNIT + batch * (past_batch - x_batch)
    part = tl.arange(0, DEPTH)
    one = first_channel + tl.arange(0, FIRST)
    steps: tl.constexpr = (C_IN + DEPTH - 1) // DEPTH
    taps: tl.constexpr = KT * KH * KW
    sum_one = tl.zeros((FIRST, PIXELS) if SWAP else (PIXELS, FIRST), tl.float32)
    one_at = one[:, None] * (taps * C_IN) + part[None, :]
    is_one = one[:, None] < C_OUT
    if SECOND:
        two = first_channel + FIRST + tl.arange(0, SECOND)
        sum_two = tl.zeros((SECOND, PIXELS) if SWAP else (PIXELS, SECOND), tl.float32)
        two_at = two[:, None] * (taps * C_IN) + part[None, :]
        is_two = two[:, None] < C_OUT

    # The innermost NEAR taps read the same values for neighbouring pixels of the tile, which come from the L1 cache.
    for index in range(taps * steps):
        tap = (index // (NEAR * steps)) * NEAR + index % NEAR
        channel = ((index // NEAR) % steps) * DEPTH
        # Frames before the first of x are in the past frames, oldest first.
        source = frame + tap // (KH * KW) - (KT - 1)
        in_row = row + (tap // KW) % KH - top
        in_column = column + tap % KW - left
        inside = is_pixel & (in_row >= 0) & (in_row < height) & (in_column >= 0) & (in_column < width)
        at = source.to(tl.int64) * x_frame
        rows_at, columns_at = x_row, x_column
        if KT > 1:
            # Sums, not tl.where or two pointers, so that Triton sees that all distances are multiples of 16 values.
            new = (source >= 0).to(tl.int32)
            at = new * at + (1 - new) * (to_past + (source + KT - 1).to(tl.int64) * past_frame)
            rows_at = new * x_row + (1 - new) * past_row
            columns_at = new * x_column + (1 - new) * past_column
        offset = in_row * rows_at + in_column * columns_at
        channels = channel + part
        in_width = channels[None, :] < C_IN
        values = tl.load(
            x_ptr + at + offset[:, None] + channels[None, :], inside[:, None] & in_width, 0.0, cache_modifier=".ca"
        )
        weights_at = weight_ptr + tap * C_IN + channel
        weights = tl.load(weights_at + one_at, is_one & in_width, 0.0)
        sum_one = _multiplied(values, weights, sum_one, PRECISION, SWAP)
        if SECOND:
            more = tl.load(weights_at + two_at, is_two & in_width, 0.0)
            sum_two = _multiplied(values, more, sum_two, PRECISION, SWAP)
    if SWAP:
        sum_one = tl.trans(sum_one)
        if SECOND:
            sum_two = tl.trans(sum_two)

    out_at = out_ptr + batch * out_batch + frame.to(tl.int64) * out_frame + row * out_row + column * out_column
    residual_at = residual_ptr + batch * residual_batch + frame.to(tl.int64) * residual_frame
    residual_at = residual_at + row * residual_row + column * residual_column
    sum_one = _completed(sum_one, residual_at, bias_ptr, one, is_pixel, C_OUT, HAS_RESIDUAL)
    if SECOND:
        sum_two = _completed(sum_two, residual_at, bias_ptr, two, is_pixel, C_OUT, HAS_RESIDUAL)
    if HAS_NORM:  # the program has all channels of a pixel
        squares = tl.sum(sum_one * sum_one, 1)
        if SECOND:
            squares += tl.sum(sum_two * sum_two, 1)
        factor = norm_scale / tl.maximum(tl.sqrt(squares), EPS)
        sum_one = _norm_silu(sum_one, factor, gamma_ptr, one, C_OUT, TO_TF32)
        if SECOND:
            sum_two = _norm_silu(sum_two, factor, gamma_ptr, two, C_OUT, TO_TF32)
    _store(sum_one, out_at, one, is_pixel, C_OUT)
    if SECOND:
        _store(sum_two, out_at, two, is_pixel, C_OUT)


@triton.jit  # type: ignore[untyped-decorator]
def _multiplied(values, weights, total, PRECISION: tl.constexpr, SWAP: tl.constexpr):
    """Add values `[PIXELS, DEPTH]` times weights `[channels, DEPTH]` to the total."""
    if SWAP:
        total = tl.dot(weights, tl.trans(values), total, input_precision=PRECISION)
    else:
        total = tl.dot(values, tl.trans(weights), total, input_precision=PRECISION)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _completed(
    total, residual_at, bias_ptr, channel, is_pixel, C_OUT: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):  # fmt: skip
    """Add bias and residual to the total; channels beyond C_OUT stay zero."""
    total += tl.load(bias_ptr + channel, channel < C_OUT, 0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        mask = is_pixel[:, None] & (channel[None, :] < C_OUT)
        total += tl.load(residual_at[:, None] + channel[None, :], mask, 0.0).to(tl.float32)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _norm_silu(value, factor, gamma_ptr, channel, C_OUT: tl.constexpr, TO_TF32: tl.constexpr):
    """Return `silu(value * factor * gamma)`."""
    gamma = tl.load(gamma_ptr + channel, channel < C_OUT, 0.0).to(tl.float32)
    return silu_rounded(value * factor[:, None] * gamma[None, :], TO_TF32)


@triton.jit  # type: ignore[untyped-decorator]
def _store(total, out_at, channel, is_pixel, C_OUT: tl.constexpr):
    """Round once and write."""
    mask = is_pixel[:, None] & (channel[None, :] < C_OUT)
    tl.store(out_at[:, None] + channel[None, :], total.to(out_at.dtype.element_ty), mask)


def convolve(
    x: Tensor,
    past: Tensor | None,
    filter: Filter,
    epilogue: Epilogue,
    tile: Tile | None = None,
    compile_for: torch.device | None = None,
) -> bool:
    """Convolve `x` `[B, I, T, h, w]` into `epilogue.out`; return True if the result is normalised (`epilogue.gamma`),
    which only a tile with all channels of a pixel can compute.

    Channels must be contiguous in all tensors, else raises ValueError; the weight is brought into channels-last memory.
    `past`: the kt - 1 frames before x, or None for zeros. `filter.pads`: zero rows above and zero columns before x; the
    shape of `out` determines those below and after. Operands of float32 products are rounded to TF32 if PyTorch's own
    convolutions do so (see `kernels.precision`). `compile_for`: compute nothing, compile the kernel for that device.
    """
    weight = filter.weight.contiguous(memory_format=torch.channels_last_3d)
    out, residual, gamma = epilogue.out, epilogue.residual, epilogue.gamma
    if any(y.shape[1] > 1 and y.stride(1) != 1 for y in (x, past, residual, out) if y is not None):
        raise ValueError("Channels must lie side by side.")
    outputs, inputs, kt, kh, kw = weight.shape
    batch, _, length, height, width = x.shape
    device = compile_for or x.device
    tiles = (tile,) if tile else offered_tiles(inputs, outputs, x.itemsize, shared_memory(device))
    normed = gamma is not None and tiles[0].channels >= outputs
    if normed:  # whichever is chosen: rounding before the norm would change the result
        tiles = tuple(tile for tile in tiles if tile.channels >= outputs)
    chosen = chosen_tile(device, width_of(outputs, x.itemsize), x.dtype)
    if compile_for is None:
        tiles = (_fastest(_named(tiles, chosen), out, device),)
    elif chosen is not None:  # else compile all, between which a measurement will choose
        tiles = _named(tiles, chosen)  # all with these sides: parts of a frame may use different ones
    if past is None and kt > 1:
        past = _zeros_before(x)
    before = x if past is None else past
    added = out if residual is None else residual
    to_past = (before.data_ptr() - x.data_ptr()) // x.itemsize
    unit = 1 if to_past % UNIT else UNIT
    for tile in tiles:
        programs = tile.programs(*out.shape[3:]) * triton.cdiv(outputs, tile.channels)
        launch(
            _convolution_kernel, (programs, length, batch), x.device, compile_for,
            x, to_past // unit, weight, filter.bias, added, gamma if normed else filter.bias, out,
            *_strides(x), *_strides(before), *_strides(added), *_strides(out),
            length, height, width, out.shape[3], out.shape[4], *filter.pads, float(outputs**0.5),
            C_IN=inputs, C_OUT=outputs, KT=kt, KH=kh, KW=kw, UNIT=unit,
            HAS_RESIDUAL=residual is not None, HAS_NORM=normed, EPS=EPS, TO_TF32=uses_tf32(x.dtype),
            PRECISION="tf32" if convolutions_use_tf32() else "ieee",
            PIXELS=tile.pixels, FIRST=tile.first, SECOND=tile.second, DEPTH=tile.depth, SWAP=tile.swap, ROWS=tile.rows,
            NEAR=tile.near(kh, kw), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return normed


def _named(tiles: tuple[Tile, ...], name: str | None) -> tuple[Tile, ...]:
    """Return the tiles with these sides; if none has them, those with the sides of the first."""
    return tuple(t for t in tiles if t.name == name) or tuple(t for t in tiles if t.name == tiles[0].name)


def _fastest(tiles: tuple[Tile, ...], out: Tensor, device: torch.device) -> Tile:
    """Return the tile, of equal results, with the fewest waves x cost to compute `out` `[B, O, T, h, w]`."""
    if len(tiles) == 1:
        return tiles[0]
    batch, channels, frames, height, width = out.shape
    size = batch * frames, height, width, channels
    fill = multiprocessors(device), out.itemsize, shared_memory(device)
    return min(tiles, key=lambda tile: tile.waves(size, *fill) * tile.cost)


def _zeros_before(x: Tensor) -> Tensor:
    """Return past frames of zeros, as before the first frame: one pixel in memory, expanded.

    With it, one kernel serves the first frame and all others. A kernel that distinguishes them would be compiled twice,
    or be slower at each frame (3 % of a decode).
    """
    return x.new_zeros(x.shape[1]).as_strided(x.shape, (0, 1, 0, 0, 0))


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    """Return the strides of batch, frame, row and column."""
    return x.stride(0), x.stride(2), x.stride(3), x.stride(4)
