"""The layers of Wan2.1's causal video VAE, each a pure step: input and past in, output and past out.

A past is what a layer remembers of earlier frames (None at a video's start): for a temporal convolution
the last two frames of its input. Frames are `[B, C, T, rows, columns]`. `Rows` says which rows of the
frame they are; see rows.py. With gradients enabled nothing is computed in place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanduet.kernels.vae.plain import NO_ROOM, VAE_TORCH_KERNELS, Room, VAEKernels, double_image_conv, empty_clip
from wanduet.models.vae.arena import Arena, copy_frames
from wanduet.models.vae.rows import Rows

FeatureCache: TypeAlias = Any  # None, a Tensor, or a tuple of pasts: one for each layer inside
Step: TypeAlias = tuple[Tensor, FeatureCache, Rows]


class Layer(Protocol):
    """What every layer offers."""

    def step(self, x: Tensor, past: FeatureCache, rows: Rows, room: Room = NO_ROOM) -> Step:
        """Process the next frames of a video. The result comes with `room`."""

    def rows_needed(self, rows: Rows) -> Rows:
        """The input rows that give at least these output rows."""


class Remembers(nn.Module):
    """A layer that keeps frames for the next step. `reuses_cache`: the caller never uses a past twice, so the
    next one may take the old one's memory; without it steps are pure. `history`: where a first past is put (see
    `WanVAE.reuse_caches`)."""

    reuses_cache = False
    history: Arena | None = None

    def keep(self, frames: Tensor, past: Tensor | None) -> Tensor:
        """The next past: a copy of `frames`, in the old past's memory where that was given up."""
        if self.reuses_cache and not torch.is_grad_enabled():
            if past is not None and past.shape == frames.shape:
                return copy_frames(past, frames)
            if self.history is not None:
                return self.history.copy_of(frames)
        return frames.clone()


class RMSNorm(nn.Module):
    """Channel norm with a learned gain: `x / |x| * sqrt(C) * gamma`, per pixel. `gamma` `[C, 1, 1(, 1)]`."""

    def __init__(self, dim: int, spatial_dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * spatial_dims))


class CausalConv3d(nn.Conv3d, Remembers):
    """A convolution that sees this frame and the two before it, never later ones."""

    kernels: VAEKernels = VAE_TORCH_KERNELS

    def __init__(self, in_dim: int, out_dim: int, kernel: int | tuple[int, int, int]) -> None:
        super().__init__(in_dim, out_dim, kernel)

    def rows_needed(self, rows: Rows) -> Rows:
        """One more row on each side for a 3x3 kernel."""
        return rows.widened(self.kernel_size[1] // 2)

    def step(
        self,
        x: Tensor,
        past: FeatureCache,
        rows: Rows,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
        consume: bool = False,
        then: RMSNorm | None = None,
        room: Room = NO_ROOM,
    ) -> Step:
        """Convolve; where `norm` is given, of `silu(norm(x))`. `residual` is added; `consume`: x is not needed after.
        With `then` the result is `silu(then(result))`."""
        spatial = self.kernel_size[1] == 3
        pads = rows.padding if spatial else (0, 0)
        gamma, out_gamma = (None if n is None else n.gamma for n in (norm, then))
        assert self.bias is not None
        out, last = self.kernels.causal_conv(
            x, past, self.weight, self.bias, pads, gamma, residual, consume, out_gamma, room
        )
        past = self.keep(last, past) if self.kernel_size[0] > 1 else None
        return out, past, (rows.narrowed() if spatial else rows).with_room(room.above)


class ResidualBlock(nn.Module):
    """Twice `norm → silu → conv`, added to the input (through a 1x1x1 convolution where widths differ)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(in_dim, 3), RMSNorm(out_dim, 3)
        self.conv1, self.conv2 = CausalConv3d(in_dim, out_dim, 3), CausalConv3d(out_dim, out_dim, 3)
        self.conv_shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def rows_needed(self, rows: Rows) -> Rows:
        """Two convolutions."""
        return rows.widened(2)

    def step(self, x: Tensor, past: FeatureCache, rows: Rows, room: Room = NO_ROOM) -> Step:
        """`[B, in, T, h, w]` to `[B, out, T, h', w]`."""
        past1, past2 = past or (None, None)
        within = Room(0, room.whole)
        h, past1, inner = self.conv1.step(x, past1, rows, self.norm1, then=self.norm2, room=within)
        outer = inner.narrowed()
        shortcut = rows.crop(x, outer)
        if isinstance(self.conv_shortcut, CausalConv3d):
            shortcut, _, _ = self.conv_shortcut.step(shortcut, None, outer, room=within)
        h, past2, outer = self.conv2.step(h, past2, inner, residual=shortcut, room=room)
        return h, (past1, past2), outer


class AttentionBlock(nn.Module):
    """Single-head self-attention over all pixels of each frame. Needs whole frames."""

    kernels: VAEKernels = VAE_TORCH_KERNELS

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, 2)
        self.to_qkv, self.proj = nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)

    def rows_needed(self, rows: Rows) -> Rows:
        """All rows: attention is global within a frame."""
        return Rows.whole(rows.height)

    def step(self, x: Tensor, past: FeatureCache, rows: Rows) -> Step:
        """`[B, C, T, h, w]` to the same shape."""
        if rows.count != rows.height:
            raise ValueError("The attention of the VAE's middle needs whole frames.")
        batch, channels, frames, height, width = x.shape
        images = x.transpose(1, 2).flatten(0, 1)
        normed = F.normalize(images.float(), dim=1).to(x.dtype) * (channels**0.5) * self.norm.gamma
        q, k, v = self.to_qkv(normed).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        heads = self.kernels.attend(q, k, v).transpose(1, 2).reshape(batch * frames, channels, height, width)
        out = self.proj(heads).unflatten(0, (batch, frames)).transpose(1, 2)
        return x + out, None, rows


class Upsample(nn.Module):
    """Twice the rows and columns (nearest, then a 3x3 convolution); with `temporal`, twice the frames before."""

    kernels: VAEKernels = VAE_TORCH_KERNELS

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        # Index 1 as in a checkpoint, where index 0 is the parameterless nearest-neighbour doubling.
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(dim, dim // 2, 3))
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None
        self.double_weight: Tensor | None
        self.register_buffer("double_weight", None, persistent=False)

    def use_kernels(self, kernels: VAEKernels) -> None:
        """Compute with these."""
        self.kernels = kernels
        prepare, conv = kernels.double_weight, cast(nn.Conv2d, self.resample[1])
        self.double_weight = None if prepare is None else prepare(conv.weight.data)

    def rows_needed(self, rows: Rows) -> Rows:
        """One more row on each side after doubling."""
        return rows.widened(1).sources_of_double()

    def step(self, x: Tensor, past: FeatureCache, rows: Rows, room: Room = NO_ROOM) -> Step:
        """`[B, C, T, h, w]` to `[B, C/2, T or 2T, 2h', 2w]`."""
        if self.time_conv is not None:
            if past is None:  # the video's first frame is one frame; what comes after starts from zeros
                past = self.time_conv.keep(empty_clip(x, x.shape[1], 2, *x.shape[3:]).zero_(), None)
            else:
                x, past, _ = self.time_conv.step(x, past, rows)
        conv, doubled = cast(nn.Conv2d, self.resample[1]), rows.doubled()
        assert conv.bias is not None
        # A pair of frames lies in the two halves of the channels.
        halves = x.split(conv.in_channels, dim=1)
        if torch.is_grad_enabled():
            images = [half[:, :, t] for t in range(x.shape[2]) for half in halves]
            wide = [double_image_conv(image, conv.weight, conv.bias, doubled.padding) for image in images]
            return torch.stack(wide, dim=2), past, doubled.narrowed()
        given = doubled.narrowed().with_room(room.above)
        out = empty_clip(x, conv.out_channels, len(halves) * x.shape[2], given.count, 2 * x.shape[4], room.whole)
        weight = conv.weight if self.double_weight is None else self.double_weight
        for index, half in enumerate(halves):
            self.kernels.double_conv(
                half, weight, conv.bias, doubled.padding, out[:, :, index :: len(halves), room.above :]
            )
        return out, past, given


class Downsample(Remembers):
    """Half the rows and columns (3x3 convolution of stride 2); with `temporal`, half the frames after."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def rows_needed(self, rows: Rows) -> Rows:
        """Two for each, and one below."""
        return rows.sources_of_half()

    def step(self, x: Tensor, past: FeatureCache, rows: Rows, room: Room = NO_ROOM) -> Step:
        """`[B, C, T, h, w]` to `[B, C, T or T/2, h/2, w/2]`; the past is the last frame before time_conv."""
        batch, frames = x.shape[0], x.shape[2]
        x = x[..., rows.start % 2 :, :]  # an output row starts at an even row
        images = F.pad(x.transpose(1, 2).flatten(0, 1), (0, 1, 0, rows.padding[1]))
        images = self.resample[1](images)
        x = images.unflatten(0, (batch, frames)).transpose(1, 2)
        if self.time_conv is not None:
            last = x[:, :, -1:]
            if past is not None:
                x = self.time_conv(torch.cat((past, x), dim=2))
            past = self.keep(last, past)
        return F.pad(x, (0, 0, room.above, 0)) if room.above else x, past, rows.halved().with_room(room.above)


@dataclass(frozen=True, slots=True)
class NormedConv:
    """The decoder's last layer: norm, silu, a convolution. Overwrites its input where that saves memory."""

    norm: RMSNorm
    conv: CausalConv3d

    def rows_needed(self, rows: Rows) -> Rows:
        """One convolution."""
        return self.conv.rows_needed(rows)

    def step(self, x: Tensor, past: FeatureCache, rows: Rows, room: Room = NO_ROOM) -> Step:
        """`[B, in, T, h, w]` to `[B, out, T, h', w]`."""
        return self.conv.step(x, past, rows, self.norm, consume=True, room=room)


def run(layers: Sequence[nn.Module], x: Tensor, past: FeatureCache, rows: Rows) -> Step:
    """Layers one after another; the past is a tuple of theirs. On some rows only: tiles.py."""
    pasts: list[FeatureCache] = []
    for layer, layer_past in zip(layers, past or [None] * len(layers), strict=True):
        x, layer_past, rows = cast(Layer, layer).step(x, layer_past, rows)
        pasts.append(layer_past)
    return x, tuple(pasts), rows
