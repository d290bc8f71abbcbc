"""Wan2.1's causal video VAE: pixels to latents and back, as pure steps over a video's frames.

Parameter names are those of a Diffusers checkpoint (`AutoencoderKLWan`). The first step of a video processes one frame
(one latent frame), every later step four frames (again one latent frame). Each step takes the feature cache that the
step before has returned; every video has its own. Encoder and decoder consist of layers that are local in space, which
can run on some rows only, and of a mid block with attention over whole frames.

Pixels are in [-1, 1]; latents are normalised (mean 0, standard deviation 1 over the training videos).
"""

import itertools
from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import cast

import torch
from torch import Tensor, nn

from wanduet.family.spec import VAESpec
from wanduet.kernels.precision import vae_precision
from wanduet.kernels.vae.plain import VAE_TORCH_KERNELS, Fused, VAEKernels, round_to_tf32
from wanduet.models.vae.arena import Arena
from wanduet.models.vae.layers import (
    AttentionBlock,
    CachingLayer,
    CausalConv3d,
    Downsample,
    FeatureCache,
    Layer,
    NormedConv,
    ResidualBlock,
    RMSNorm,
    Step,
    Upsample,
    run,
)
from wanduet.models.vae.rows import Rows, split_rows
from wanduet.models.vae.tiles import Halo, run_rows


class MidBlock(nn.Module):
    """Residual block, attention, residual block; at the lowest resolution, on whole frames."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(dim)])
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])

    def step(self, x: Tensor, feature_cache: FeatureCache, rows: Rows) -> Step:
        """`[B, C, T, h, w]` to the same shape."""
        return run([self.resnets[0], self.attentions[0], self.resnets[1]], x, feature_cache, rows)


class Encoder(nn.Module):
    """Frames to the moments of latents."""

    def __init__(self, spec: VAESpec) -> None:
        super().__init__()
        dims = [spec.base_dim * m for m in (1, *spec.dim_mult)]
        self.conv_in = CausalConv3d(3, dims[0], 3)
        self.down_blocks = nn.ModuleList()
        for level, (in_dim, out_dim) in enumerate(itertools.pairwise(dims)):
            widths = [in_dim] + [out_dim] * spec.num_res_blocks
            self.down_blocks.extend(ResidualBlock(a, b) for a, b in itertools.pairwise(widths))
            if level < len(spec.dim_mult) - 1:
                self.down_blocks.append(Downsample(out_dim, spec.temperal_downsample[level]))
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = RMSNorm(dims[-1], 3)
        self.conv_out = CausalConv3d(dims[-1], 2 * spec.z_dim, 3)

    @property
    def local_layers(self) -> list[nn.Module]:
        """The layers before the mid block, which read only neighbouring rows."""
        return [self.conv_in, *self.down_blocks]

    def mid(self, x: Tensor, feature_cache: FeatureCache, rows: Rows) -> tuple[Tensor, FeatureCache]:
        """Mid block and output convolution: features `[B, C, T, h, w]` of whole frames to `[B, 2 z_dim, T, h, w]`."""
        mid_cache, out_cache = feature_cache or (None, None)
        x, mid_cache, rows = self.mid_block.step(x, mid_cache, rows)
        x, out_cache, _ = self.conv_out.step(x, out_cache, rows, Fused(self.norm_out.gamma))
        return x, (mid_cache, out_cache)


class UpBlock(nn.Module):
    """Residual blocks, then an upsampling, except at the last level."""

    def __init__(self, in_dim: int, out_dim: int, num_res_blocks: int, upsample: Upsample | None) -> None:
        super().__init__()
        widths = [in_dim] + [out_dim] * (num_res_blocks + 1)
        pairs = itertools.pairwise(widths)
        self.resnets = nn.ModuleList(ResidualBlock(a, b) for a, b in pairs)
        self.upsamplers = None if upsample is None else nn.ModuleList([upsample])


class Decoder(nn.Module):
    """Latents to frames."""

    def __init__(self, spec: VAESpec) -> None:
        super().__init__()
        dims = [spec.base_dim * m for m in (spec.dim_mult[-1], *reversed(spec.dim_mult))]
        self.conv_in = CausalConv3d(spec.z_dim, dims[0], 3)
        self.mid_block = MidBlock(dims[0])
        temporal = (*reversed(spec.temperal_downsample), None)
        self.up_blocks = nn.ModuleList()
        for level, (in_dim, out_dim) in enumerate(itertools.pairwise(dims)):
            doubles_time = temporal[level]
            upsample = None if doubles_time is None else Upsample(out_dim, doubles_time)
            entering = in_dim if level == 0 else in_dim // 2  # the upsampling before has halved the width
            self.up_blocks.append(UpBlock(entering, out_dim, spec.num_res_blocks, upsample))
        self.norm_out = RMSNorm(dims[-1], 3)
        self.conv_out = CausalConv3d(dims[-1], 3, 3)

    def mid(self, z: Tensor, feature_cache: FeatureCache) -> tuple[Tensor, FeatureCache]:
        """Latents `[B, z_dim, T, h, w]` to features `[B, C, T, h, w]` before the first upsampling.

        Runs on whole frames: the mid block because of its attention, the residual blocks of the same resolution because
        their halos would be large for a tile, and a tile's pixels too few for a GPU.
        """
        in_cache, mid_cache, resnets_cache = feature_cache or (None, None, None)
        x, in_cache, rows = self.conv_in.step(z, in_cache, Rows.whole(z.shape[-2]))
        x, mid_cache, rows = self.mid_block.step(x, mid_cache, rows)
        x, resnets_cache, _ = run(self._mid_resnets, x, resnets_cache, rows)
        return x, (in_cache, mid_cache, resnets_cache)

    @property
    def layers(self) -> list[nn.Module]:
        """The layers between the mid block and the output convolution, which read only neighbouring rows."""
        layers: list[nn.Module] = []
        for block in self.up_blocks:
            layers += [*block.resnets, *(block.upsamplers or ())]  # type: ignore[misc]
        return layers

    @property
    def mid_layers(self) -> list[nn.Module]:
        """The modules that `mid` runs, on whole frames."""
        return [self.conv_in, self.mid_block, *self._mid_resnets]

    @property
    def _mid_resnets(self) -> list[nn.Module]:
        """The residual blocks before the first upsampling."""
        return list(cast(UpBlock, self.up_blocks[0]).resnets)

    @property
    def local_layers(self) -> list[Layer]:
        """The layers from the first upsampling to the pixels, which can run on some rows only."""
        layers = cast(list[Layer], self.layers[len(self._mid_resnets) :])
        return [*layers, NormedConv(self.norm_out, self.conv_out)]


class WanVAE(nn.Module):
    """Encoder and decoder, with the normalisation of latents."""

    kernels: VAEKernels = VAE_TORCH_KERNELS
    tf32: bool | None = None
    """Whether float32 convolutions on a GPU may use TF32. None: the process's setting decides (`kernels.precision`)."""

    def __init__(self, spec: VAESpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder, self.decoder = Encoder(spec), Decoder(spec)
        self.quant_conv = CausalConv3d(2 * spec.z_dim, 2 * spec.z_dim, 1)
        self.post_quant_conv = CausalConv3d(spec.z_dim, spec.z_dim, 1)

    @cached_property
    def _caching_layers(self) -> list[CachingLayer]:
        return [module for module in self.modules() if isinstance(module, CachingLayer)]

    def reuse_caches(self, enabled: bool = True, arena: Arena | None = None) -> None:
        """Let steps overwrite the feature cache that they are given, for callers that use each cache once.

        This halves the memory. `arena`: where a video's first caches are allocated.
        """
        for layer in self._caching_layers:
            layer.reuses_cache, layer.arena = enabled, arena

    def use_kernels(self, kernels: VAEKernels) -> None:
        """Set the kernels that compute from now on.

        Not between two steps of a video: each implementation has its own form of the feature cache.
        """
        self.kernels = kernels
        with vae_precision(self.tf32):  # weights are prepared for the precision that they are used in
            for module in self.modules():
                if isinstance(module, Upsample):
                    module.use_kernels(kernels)
                elif isinstance(module, AttentionBlock | CausalConv3d):
                    module.kernels = kernels

    def channels_last(self) -> None:
        """Store weights with channels last, in which most GPUs' convolutions are fastest; activations follow."""
        for parameter in self.parameters():
            if parameter.ndim == 5:
                parameter.data = parameter.data.to(memory_format=torch.channels_last_3d)
            elif parameter.ndim == 4 and parameter.shape[-1] > 0:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)

    def round_to_tf32(self) -> None:
        """Round the convolutions' float32 weights to TF32's 11 significant bits, to nearest.

        Matrix units truncate the other bits instead of rounding, which makes every result slightly too small.
        """
        for parameter in self.parameters():
            if parameter.ndim >= 4 and parameter.dtype == torch.float32 and not parameter.is_meta:
                round_to_tf32(parameter.data)

    # Decoding.

    @staticmethod
    def decodes(name: str) -> bool:
        """Whether decoding needs the parameter of this name."""
        return name.startswith(("decoder.", "post_quant_conv."))

    @property
    def decoding_parts(self) -> tuple[nn.Module, ...]:
        """The modules that decoding needs."""
        return self.decoder, self.post_quant_conv

    def decode_mid(self, z: Tensor, feature_cache: FeatureCache) -> tuple[Tensor, FeatureCache]:
        """One normalised latent frame `[B, 16, 1, h, w]` to the mid features `[B, C, 1, h, w]` (`Decoder.mid`)."""
        mean, std = self._statistics(z)
        with vae_precision(self.tf32):
            return self.decoder.mid(self.post_quant_conv(z * std + mean), feature_cache)

    def decode_rows(
        self,
        mid: Tensor,
        feature_cache: FeatureCache,
        wanted: Rows,
        above: Halo | None = None,
        below: Halo | None = None,
    ) -> tuple[Tensor, FeatureCache]:
        """Mid features `[B, C, 1, h, w]` to pixels `[B, 3, 1 or 4, rows, W]` of the rows `wanted` (of H).

        `above`, `below`: halos shared with the tiles above and below, see `run_rows`.
        """
        with vae_precision(self.tf32):
            x, feature_cache = run_rows(self.decoder.local_layers, mid, feature_cache, wanted, above, below)
        return x.clamp(-1.0, 1.0), feature_cache

    def decode_step(self, z: Tensor, feature_cache: FeatureCache) -> tuple[Tensor, FeatureCache]:
        """One latent frame `[B, 16, 1, h, w]` to pixels `[B, 3, t, H, W]`: t is 1 for a video's first frame, else 4."""
        mid_cache, rows_cache = feature_cache or (None, None)
        mid, mid_cache = self.decode_mid(z, mid_cache)
        frames, rows_cache = self.decode_rows(mid, rows_cache, self._all_pixel_rows(z.shape[-2]))
        return frames, (mid_cache, rows_cache)

    def decode_frames(self, latents: Tensor) -> Iterator[Tensor]:
        """Latents `[B, 16, T, h, w]` to the pixels of one latent frame after the other, see `decode_step`."""
        feature_cache: FeatureCache = None
        for z in latents.split(1, dim=2):
            frames, feature_cache = self.decode_step(z, feature_cache)
            yield frames

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, 16, T, h, w]` to a whole video `[B, 3, 4T - 3, H, W]`, for training and tests."""
        return torch.cat(list(self.decode_frames(latents)), dim=2)

    # Encoding.

    @staticmethod
    def encodes(name: str) -> bool:
        """Whether encoding needs the parameter of this name."""
        return name.startswith(("encoder.", "quant_conv."))

    @property
    def encoding_parts(self) -> tuple[nn.Module, ...]:
        """The modules that encoding needs."""
        return self.encoder, self.quant_conv

    def encode_rows(
        self,
        frames: Tensor,
        feature_cache: FeatureCache,
        wanted: Rows,
        above: Halo | None = None,
        below: Halo | None = None,
    ) -> tuple[Tensor, FeatureCache]:
        """One frame (a video's first) or four `[B, 3, T, H, W]` to features `[B, C, 1, rows, w]` before the mid block,
        of the rows `wanted` (of h).

        `above`, `below`: halos shared with the tiles above and below, see `run_rows`.
        """
        layers = cast(list[Layer], self.encoder.local_layers)
        with vae_precision(self.tf32):
            return run_rows(layers, frames, feature_cache, wanted, above, below)

    def encode_mid(self, features: Tensor, feature_cache: FeatureCache) -> tuple[Tensor, FeatureCache]:
        """Features of whole frames `[B, C, 1, h, w]` to moments `[B, 32, 1, h, w]`: mean and log-variance, not
        normalised."""
        with vae_precision(self.tf32):
            moments, feature_cache = self.encoder.mid(features, feature_cache, Rows.whole(features.shape[-2]))
            return self.quant_conv(moments), feature_cache

    def encode_step(
        self, frames: Tensor, feature_cache: FeatureCache, num_tiles: int = 1
    ) -> tuple[Tensor, FeatureCache]:
        """One frame (a video's first) or four `[B, 3, T, H, W]` to moments `[B, 32, 1, h, w]`, see `encode_mid`.

        The local layers run in `num_tiles` row tiles.
        """
        mid_cache, tile_caches = feature_cache or (None, None)
        features, caches = [], []
        above: Halo | None = None
        for index, wanted in enumerate(self.encode_tiles(frames.shape[-2], num_tiles)):
            below = Halo(wanted)
            x, cache = self.encode_rows(frames, tile_caches[index] if tile_caches else None, wanted, above, below)
            features.append(x)
            caches.append(cache)
            above = below
        x = torch.cat(features, dim=3) if len(features) > 1 else features[0]
        moments, mid_cache = self.encode_mid(x, mid_cache)
        return moments, (mid_cache, tuple(caches))

    def encode_tiles(self, height: int, num_tiles: int) -> list[Rows]:
        """The latent rows of each of at most `num_tiles` row tiles of a frame of `height` pixels, top to bottom."""
        return split_rows(Rows.whole(height // self.spec.spatial_stride), [1.0] * num_tiles)

    def encode_moments(self, video: Tensor, num_tiles: int = 1) -> Tensor:
        """A video `[B, 3, 4n + 1, H, W]` to moments `[B, 32, n + 1, h, w]`, see `encode_step`."""
        feature_cache: FeatureCache = None
        moments = []
        for chunk in (video[:, :, :1], *video[:, :, 1:].split(4, dim=2)):
            if chunk.shape[2]:
                step, feature_cache = self.encode_step(chunk, feature_cache, num_tiles)
                moments.append(step)
        return torch.cat(moments, dim=2)

    def encode(self, video: Tensor, num_tiles: int = 1) -> Tensor:
        """A video `[B, 3, 4n + 1, H, W]` to normalised latents `[B, 16, n + 1, h, w]`, the posterior's mode."""
        return self.normalize(self.encode_moments(video, num_tiles).chunk(2, dim=1)[0])

    def normalize(self, z: Tensor) -> Tensor:
        """Normalise the encoder's latents `[B, 16, T, h, w]` to mean 0 and standard deviation 1."""
        mean, std = self._statistics(z)
        return (z - mean) / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return _latent_statistics(self.spec, like.dtype, like.device)

    def _all_pixel_rows(self, latent_rows: int) -> Rows:
        return Rows.whole(latent_rows * self.spec.spatial_stride)


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels `[1, 3, t, h, w]` in [-1, 1] to `[t, h, w, 3]` uint8, rounded to nearest."""
    return pixels[0].mul(127.5).add_(127.5).round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 3, 0)


@lru_cache(maxsize=16)
def _latent_statistics(spec: VAESpec, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `[1, 16, 1, 1, 1]` on the device, cached so that no step copies them there."""
    values = (spec.latents_mean, spec.latents_std)
    mean, std = (torch.tensor(v, dtype=dtype, device=device).view(1, -1, 1, 1, 1) for v in values)
    return mean, std
