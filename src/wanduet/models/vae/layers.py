"""The layers of Wan2.1's causal video VAE, each a pure step: frames and a feature cache in, both out.

A feature cache (`feat_cache` in Wan's code) is what a layer keeps of earlier frames: for a temporal convolution the
last two frames of its input; None at a video's start. Frames are `[B, C, T, rows, columns]`; `Rows` says which rows of
the frame they are (rows.py). With gradients enabled nothing is computed in place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanduet.kernels.vae.plain import (
    NO_ROOM,
    NOT_FUSED,
    VAE_TORCH_KERNELS,
    Filter,
    Fused,
    Room,
    VAEKernels,
    double_image_conv,
    empty_clip,
)
from wanduet.models.vae.arena import Arena, copy_frames
from wanduet.models.vae.rows import Rows

FeatureCache: TypeAlias = Any  # None, a Tensor, or a tuple of caches: one for each layer inside
Step: TypeAlias = tuple[Tensor, FeatureCache, Rows]


class Layer(Protocol):
    """The interface of the layers that run on some rows of a frame."""

    def step(self, x: Tensor, feature_cache: FeatureCache, rows: Rows, room: Room = NO_ROOM) -> Step:
        """Process the next frames of a video, of which `x` has the given rows.

        Returns the result, whose memory is allocated with `room`, the next feature cache, and the result's rows.
        """

    def rows_needed(self, rows: Rows) -> Rows:
        """The input rows needed to compute at least these output rows."""


class CachingLayer(nn.Module):
    """A layer that caches frames for the next step.

    `reuses_cache`: the next cache overwrites the one passed to `step`, which the caller must not use again; otherwise
    steps are pure. `arena`: where a video's first caches are allocated. Set by `WanVAE.reuse_caches`.
    """

    reuses_cache = False
    arena: Arena | None = None

    def next_cache(self, frames: Tensor, feature_cache: Tensor | None) -> Tensor:
        """A copy of `frames` for the next step, in the old cache's memory if it may be overwritten."""
        if self.reuses_cache and not torch.is_grad_enabled():
            if feature_cache is not None and feature_cache.shape == frames.shape:
                return copy_frames(feature_cache, frames)
            if self.arena is not None:
                return self.arena.clone(frames)
        return frames.clone()


class RMSNorm(nn.Module):
    """Channel norm with a learned gain: `x / |x| * sqrt(C) * gamma`, per pixel. `gamma` `[C, 1, 1(, 1)]`."""

    def __init__(self, dim: int, spatial_dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * spatial_dims))


class CausalConv3d(nn.Conv3d, CachingLayer):
    """A convolution over a frame and the two before it, never later ones."""

    kernels: VAEKernels = VAE_TORCH_KERNELS

    def __init__(self, in_dim: int, out_dim: int, kernel: int | tuple[int, int, int]) -> None:
        super().__init__(in_dim, out_dim, kernel)

    def rows_needed(self, rows: Rows) -> Rows:
        """One more row on each side for a 3x3 kernel."""
        return rows.widened(self.kernel_size[1] // 2)

    def step(
        self,
        x: Tensor,
        feature_cache: FeatureCache,
        rows: Rows,
        fused: Fused = NOT_FUSED,
        room: Room = NO_ROOM,
    ) -> Step:
        """Convolve `x` `[B, in, T, h, w]`, with what is `fused`, to `[B, out, T, h', w]`."""
        spatial = self.kernel_size[1] == 3
        pads = rows.padding if spatial else (0, 0)
        assert self.bias is not None
        out, last = self.kernels.causal_conv(x, feature_cache, Filter(self.weight, self.bias, pads), fused, room)
        feature_cache = self.next_cache(last, feature_cache) if self.kernel_size[0] > 1 else None
        return out, feature_cache, (rows.narrowed() if spatial else rows).extended_above(room.above)


class ResidualBlock(nn.Module):
    """Twice `norm → silu → conv`, added to the input (after a 1x1x1 convolution if the widths differ)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(in_dim, 3), RMSNorm(out_dim, 3)
        self.conv1, self.conv2 = CausalConv3d(in_dim, out_dim, 3), CausalConv3d(out_dim, out_dim, 3)
        self.conv_shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def rows_needed(self, rows: Rows) -> Rows:
        """Two more rows on each side, for two convolutions."""
        return rows.widened(2)

    def step(self, x: Tensor, feature_cache: FeatureCache, rows: Rows, room: Room = NO_ROOM) -> Step:
        """`[B, in, T, h, w]` to `[B, out, T, h', w]`."""
        cache1, cache2 = feature_cache or (None, None)
        within = Room(0, room.whole)
        norms = Fused(self.norm1.gamma, out_gamma=self.norm2.gamma)
        h, cache1, inner = self.conv1.step(x, cache1, rows, norms, within)
        outer = inner.narrowed()
        shortcut = rows.crop(x, outer)
        if isinstance(self.conv_shortcut, CausalConv3d):
            shortcut, _, _ = self.conv_shortcut.step(shortcut, None, outer, room=within)
        h, cache2, outer = self.conv2.step(h, cache2, inner, Fused(residual=shortcut), room)
        return h, (cache1, cache2), outer


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

    def step(self, x: Tensor, feature_cache: FeatureCache, rows: Rows) -> Step:
        """`[B, C, T, h, w]` to the same shape. Raises ValueError if `rows` are not a whole frame."""
        if rows.count != rows.height:
            raise ValueError("The attention of the VAE's mid block needs whole frames.")
        batch, channels, frames, height, width = x.shape
        images = x.transpose(1, 2).flatten(0, 1)
        normed = F.normalize(images.float(), dim=1).to(x.dtype) * (channels**0.5) * self.norm.gamma
        q, k, v = self.to_qkv(normed).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        heads = self.kernels.attend(q, k, v).transpose(1, 2).reshape(batch * frames, channels, height, width)
        out = self.proj(heads).unflatten(0, (batch, frames)).transpose(1, 2)
        return x + out, None, rows


class Upsample(nn.Module):
    """Double rows and columns (nearest neighbour, then a 3x3 convolution); with `temporal`, double the frames first."""

    kernels: VAEKernels = VAE_TORCH_KERNELS

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        # Index 1 as in a checkpoint, where index 0 is the parameterless nearest-neighbour doubling.
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(dim, dim // 2, 3))
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None
        self.double_weight: Tensor | None
        self.register_buffer("double_weight", None, persistent=False)

    def use_kernels(self, kernels: VAEKernels) -> None:
        """Set the kernels, and prepare the doubling convolution's weight for them."""
        self.kernels = kernels
        prepare, conv = kernels.double_weight, cast(nn.Conv2d, self.resample[1])
        self.double_weight = None if prepare is None else prepare(conv.weight.data)

    def rows_needed(self, rows: Rows) -> Rows:
        """One more row on each side of the doubled image."""
        return rows.widened(1).sources_of_double()

    def step(self, x: Tensor, feature_cache: FeatureCache, rows: Rows, room: Room = NO_ROOM) -> Step:
        """`[B, C, T, h, w]` to `[B, C/2, T or 2T, 2h', 2w]`."""
        if self.time_conv is not None:
            if feature_cache is None:  # a video's first frame is not doubled; the next step starts from zeros
                feature_cache = self.time_conv.next_cache(empty_clip(x, x.shape[1], 2, *x.shape[3:]).zero_(), None)
            else:
                x, feature_cache, _ = self.time_conv.step(x, feature_cache, rows)
        conv, doubled = cast(nn.Conv2d, self.resample[1]), rows.doubled()
        assert conv.bias is not None
        # time_conv puts a pair of frames into the two halves of the channels.
        halves = x.split(conv.in_channels, dim=1)
        if torch.is_grad_enabled():
            images = [half[:, :, t] for t in range(x.shape[2]) for half in halves]
            wide = [double_image_conv(image, conv.weight, conv.bias, doubled.padding) for image in images]
            return torch.stack(wide, dim=2), feature_cache, doubled.narrowed()
        out_rows = doubled.narrowed().extended_above(room.above)
        out = empty_clip(x, conv.out_channels, len(halves) * x.shape[2], out_rows.count, 2 * x.shape[4], room.whole)
        weight = conv.weight if self.double_weight is None else self.double_weight
        for index, half in enumerate(halves):
            self.kernels.double_conv(
                half, weight, conv.bias, doubled.padding, out[:, :, index :: len(halves), room.above :]
            )
        return out, feature_cache, out_rows


class Downsample(CachingLayer):
    """Halve rows and columns (3x3 convolution of stride 2); with `temporal`, then halve the frames."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def rows_needed(self, rows: Rows) -> Rows:
        """Two rows for each, and one below."""
        return rows.sources_of_half()

    def step(self, x: Tensor, feature_cache: FeatureCache, rows: Rows, room: Room = NO_ROOM) -> Step:
        """`[B, C, T, h, w]` to `[B, C, T or T/2, h/2, w/2]`; the cache is the last frame of time_conv's input."""
        batch, frames = x.shape[0], x.shape[2]
        x = x[..., rows.start % 2 :, :]  # output row r starts at input row 2r
        images = F.pad(x.transpose(1, 2).flatten(0, 1), (0, 1, 0, rows.padding[1]))
        images = self.resample[1](images)
        x = images.unflatten(0, (batch, frames)).transpose(1, 2)
        if self.time_conv is not None:
            last = x[:, :, -1:]
            if feature_cache is not None:
                x = self.time_conv(torch.cat((feature_cache, x), dim=2))
            feature_cache = self.next_cache(last, feature_cache)
        out = F.pad(x, (0, 0, room.above, 0)) if room.above else x
        return out, feature_cache, rows.halved().extended_above(room.above)


@dataclass(frozen=True, slots=True)
class NormedConv:
    """The decoder's last layer: norm, SiLU, convolution. May overwrite its input, which saves memory."""

    norm: RMSNorm
    conv: CausalConv3d

    def rows_needed(self, rows: Rows) -> Rows:
        """One more row on each side, for the convolution."""
        return self.conv.rows_needed(rows)

    def step(self, x: Tensor, feature_cache: FeatureCache, rows: Rows, room: Room = NO_ROOM) -> Step:
        """`[B, in, T, h, w]` to `[B, out, T, h', w]`."""
        return self.conv.step(x, feature_cache, rows, Fused(self.norm.gamma, consume=True), room)


def run(layers: Sequence[nn.Module], x: Tensor, feature_cache: FeatureCache, rows: Rows) -> Step:
    """Run layers one after another; the feature cache is a tuple of theirs. (To run row tiles: `tiles.run_rows`.)"""
    caches: list[FeatureCache] = []
    for layer, cache in zip(layers, feature_cache or [None] * len(layers), strict=True):
        x, cache, rows = cast(Layer, layer).step(x, cache, rows)
        caches.append(cache)
    return x, tuple(caches), rows
