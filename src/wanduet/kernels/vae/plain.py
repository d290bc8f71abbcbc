"""The VAE's fused operations: causal convolution with norm, past frames and residual; convolution of a doubled image.

`VAEKernels` is the set of operations that the VAE calls; `VAE_TORCH_KERNELS` has the plain PyTorch form of each, the
reference for every faster one. With gradients enabled, nothing is computed in place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from wanduet.kernels.precision import convolutions_use_tf32

SCORES_BYTES = 64 * 2**20  # of the mid block's attention scores at a time


@dataclass(frozen=True, slots=True)
class Room:
    """How to allocate a result: with `above` uninitialised rows above it, in memory for at least `whole` rows.

    Successive tensors whose heights differ by a row then have equal sizes, so each fits in the memory of an earlier
    one.
    """

    above: int = 0
    whole: int = 0


NO_ROOM = Room()


@dataclass(frozen=True, slots=True)
class Filter:
    """A convolution's weight `[O, I, kt, kh, kw]` and bias `[O]`, and its zero `pads`: rows above and below x.

    (For `conv.convolve`: rows above and columns before x.)
    """

    weight: Tensor
    bias: Tensor
    pads: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Fused:
    """What is done together with a convolution of x.

    `gamma` `[I, 1, 1, 1]`: convolve `silu(norm(x))`. `residual`, of the result's shape, is added to the result, of which
    `out_gamma` `[O, 1, 1, 1]` then makes `silu(norm(result))`. `consume`: x may be overwritten.
    """

    gamma: Tensor | None = None
    residual: Tensor | None = None
    out_gamma: Tensor | None = None
    consume: bool = False


NOT_FUSED = Fused()


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What a convolution kernel does with its sums: add `residual`, round once, and write to `out` `[B, O, T, h', w']`.

    With `gamma` `[O, 1, 1, 1]`, it writes `silu(norm(result))` if it can.
    """

    out: Tensor
    residual: Tensor | None = None
    gamma: Tensor | None = None


class CausalConv(Protocol):
    """A convolution over time and space that is causal in time."""

    def __call__(
        self, x: Tensor, past: Tensor | None, filter: Filter, fused: Fused = NOT_FUSED, room: Room = NO_ROOM
    ) -> tuple[Tensor, Tensor]:
        """Convolve `x` `[B, I, T, h, w]`; return `[B, O, T, h', w]`, h' = h + pads - (kh - 1), and a `past`.

        `past`: the feature cache that the previous call returned (None: zeros): the kt - 1 frames before x of what is
        convolved (with `fused.gamma`, after the norm); may be a view. `room`: allocation of the result.
        """


class DoubleConv(Protocol):
    """A convolution of an image whose rows and columns are doubled."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, pads: tuple[int, int], out: Tensor) -> None:
        """Convolve `x` `[B, I, T, h, w]`, doubled to 2h x 2w by nearest neighbours, with a kernel `[O, I, 3, 3]`.

        `weight`: what `double_weight` returns for that kernel. The result is written into `out`
        `[B, O, T, 2h + pads - (kh - 1), 2w]`, which may be a view. For inference only.
        """


@dataclass(frozen=True, slots=True)
class VAEKernels:
    """One implementation of each operation."""

    name: str
    causal_conv: CausalConv
    double_weight: Callable[[Tensor], Tensor] | None  # converts a kernel `[O, I, 3, 3]` once; None: no conversion
    double_conv: DoubleConv
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]


def norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """Return `silu(x / |x| * sqrt(C) * gamma)` of x `[B, C, ...]`, with the norm over channels in float32."""
    normalized = F.normalize(x.float(), dim=1).to(x.dtype) * (x.shape[1] ** 0.5) * gamma
    return F.silu(normalized, inplace=not torch.is_grad_enabled())


def causal_input(x: Tensor, past: Tensor | None, pads: tuple[int, int], frames: int, gamma: Tensor | None) -> Tensor:
    """Return the input of a causal convolution: `frames` past frames, then `x`, with zero rows; writes it once.

    x `[B, C, T, h, w]`; `past` `[B, C, frames, h + pads, w]` or None (zeros); `pads`: zero rows above and below. With
    `gamma` `[C, 1, 1, 1]`, the new frames are `norm_silu(x, gamma)`. Returns `[B, C, frames + T, h + pads, w]`, in the
    memory layout of x.
    """
    top, bottom = pads
    if torch.is_grad_enabled():
        value = x if gamma is None else norm_silu(x, gamma)
        value = F.pad(value, (0, 0, top, bottom))
        before = value.new_zeros(*value.shape[:2], frames, *value.shape[3:]) if past is None else past
        return torch.cat((before, value), dim=2) if frames else value
    if not frames and not top and not bottom and gamma is None:
        return x
    length, height = x.shape[2:4]
    out = empty_clip(x, x.shape[1], frames + length, top + height + bottom, x.shape[4])
    if past is None:
        out[:, :, :frames].zero_()
    else:
        out[:, :, :frames].copy_(past)
    out[:, :, frames:, :top].zero_()
    out[:, :, frames:, top + height :].zero_()
    inside = out[:, :, frames:, top : top + height]
    if gamma is None:
        inside.copy_(x)
    else:
        for frame in range(length):  # one frame at a time, to keep the temporaries small
            inside[:, :, frame : frame + 1].copy_(norm_silu(x[:, :, frame : frame + 1], gamma))
    return out


def _norm_silu_in_place(x: Tensor, gamma: Tensor) -> Tensor:
    for frame in x.split(1, dim=2):
        frame.copy_(norm_silu(frame, gamma))
    return x


def causal_conv(
    x: Tensor, past: Tensor | None, filter: Filter, fused: Fused = NOT_FUSED, room: Room = NO_ROOM
) -> tuple[Tensor, Tensor]:
    """See CausalConv. Runs PyTorch's convolution on the output of `causal_input`."""
    weight, pads = filter.weight, filter.pads
    frames = weight.shape[2] - 1
    # With equal pads, as of a whole frame, the convolution pads the rows; else `causal_input` writes zero rows.
    native = min(pads) if pads[0] == pads[1] else 0
    padded = causal_input(x, past, (0, 0) if native else pads, frames, fused.gamma)
    out = _conv3d(padded, weight, filter.bias, native, weight.shape[4] // 2)
    if fused.residual is not None:
        out = out + fused.residual if torch.is_grad_enabled() else out.add_(fused.residual)
    if fused.out_gamma is not None:
        normed = norm_silu if torch.is_grad_enabled() else _norm_silu_in_place
        out = normed(out, fused.out_gamma)
    if room.above:
        out = F.pad(out, (0, 0, room.above, 0))
    return out, padded[:, :, padded.shape[2] - frames :]


def _conv3d(x: Tensor, weight: Tensor, bias: Tensor, rows: int, columns: int) -> Tensor:
    """Convolve with `rows` and `columns` zero rows and columns on each side."""
    if x.device.type == "meta" and x.stride(1) == 1:  # PyTorch's meta form loses the layout, which a GPU keeps
        outputs, _, kt, kh, kw = weight.shape
        sizes = (x.shape[2] + 1 - kt, x.shape[3] + 2 * rows + 1 - kh, x.shape[4] + 2 * columns + 1 - kw)
        return empty_clip(x, outputs, *sizes)
    return F.conv3d(x, weight, bias, padding=(0, rows, columns))


def double_conv(x: Tensor, weight: Tensor, bias: Tensor, pads: tuple[int, int], out: Tensor) -> None:
    """See DoubleConv. Converts one frame at a time, because the doubled input is a decode's largest tensor."""
    for index, image in enumerate(x.unbind(2)):
        out[:, :, index] = double_image_conv(image, weight, bias, pads)


def double_image_conv(image: Tensor, weight: Tensor, bias: Tensor, pads: tuple[int, int]) -> Tensor:
    """Do `double_conv` for one image `[B, I, h, w]` and return the result; differentiable."""
    top, bottom = pads
    wide = F.interpolate(image, scale_factor=2.0, mode="nearest-exact")
    if top != bottom:
        wide, top = F.pad(wide, (0, 0, top, bottom)), 0
    return F.conv2d(wide, weight, bias, padding=(top, weight.shape[3] // 2))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax attention with one head within images `[N, L, C]`, in the same shape."""
    keys, values = k.unsqueeze(1), v.unsqueeze(1)
    outs = [F.scaled_dot_product_attention(rows.unsqueeze(1), keys, values).squeeze(1) for rows in query_parts(q)]
    if q.is_meta:  # the parts that `query_parts` omits
        outs.append(torch.empty_like(q[:, sum(out.shape[1] for out in outs) :]))
    return torch.cat(outs, dim=1)


def query_parts(q: Tensor) -> tuple[Tensor, ...]:
    """Split queries `[N, L, C]` into parts, so that a part's scores against all L keys need bounded memory.

    The number of scores grows with the square of the pixels. On the meta device, returns only as many parts as show the
    memory of all: four, and the last.
    """
    length = q.shape[1]
    rows = max(1, SCORES_BYTES // (4 * q.shape[0] * length))
    if not q.is_meta or length <= 5 * rows:
        return q.split(rows, dim=1)
    return *q[:, : 4 * rows].split(rows, dim=1), q[:, length - (length % rows or rows) :]


def uses_tf32(dtype: torch.dtype) -> bool:
    """Return True if operands of this dtype are rounded to TF32: if PyTorch's own convolutions do so."""
    return dtype == torch.float32 and convolutions_use_tf32()


def round_to_tf32(weight: Tensor) -> None:
    """Round float32 values in place to the nearest numbers of 11 bits. Idempotent."""
    weight.view(torch.int32).add_(0x1000).bitwise_and_(-0x2000)


def empty_clip(like: Tensor, channels: int, frames: int, rows: int, columns: int, whole: int = 0) -> Tensor:
    """Allocate `[B, channels, frames, rows, columns]` in memory for `whole` rows or more; channels last if `like`
    is."""
    layout = torch.channels_last_3d if like.stride(1) == 1 < like.shape[1] else torch.contiguous_format
    shape = (like.shape[0], channels, frames, max(rows, whole), columns)
    clip = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)
    return clip[:, :, :, :rows] if whole > rows else clip


VAE_TORCH_KERNELS = VAEKernels("torch", causal_conv, None, double_conv, attend)
