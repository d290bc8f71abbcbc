"""Wan2.1's causal video VAE: pixels to latents and back, as pure steps over a video's frames.

Parameter names are those of a Diffusers checkpoint (`AutoencoderKLWan`). The first step of a video takes
one frame (one latent frame); every later one four frames (again one latent frame). What a step must
remember is returned as `past` and given to the next; two videos never share one. Each direction has a
part that is local in space, which may run on some rows only, and a trunk with global attention.

Pixels are in [-1, 1]; latents are normalised (mean 0, standard deviation 1 over the training videos).
"""

import itertools
from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import cast

import torch
from torch import Tensor, nn

from wanduet.family.specs import VAESpec
from wanduet.kernels.precision import vae_precision
from wanduet.kernels.vae.plain import VAE_TORCH_KERNELS, VAEKernels, round_to_tf32
from wanduet.models.vae.arena import Arena
from wanduet.models.vae.layers import (
    AttentionBlock,
    CausalConv3d,
    Downsample,
    FeatureCache,
    Layer,
    NormedConv,
    Remembers,
    ResidualBlock,
    RMSNorm,
    Step,
    Upsample,
    run,
)
from wanduet.models.vae.rows import Rows, split_rows
from wanduet.models.vae.tiles import Halo, run_rows


class MidBlock(nn.Module):
    """Residual, attention, residual; at the lowest resolution, on whole frames."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(dim)])
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])

    def step(self, x: Tensor, past: FeatureCache, rows: Rows) -> Step:
        """`[B, C, T, h, w]` to the same shape."""
        return run([self.resnets[0], self.attentions[0], self.resnets[1]], x, past, rows)


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
        """The layers that see only neighbouring rows."""
        return [self.conv_in, *self.down_blocks]

    def trunk(self, x: Tensor, past: FeatureCache, rows: Rows) -> tuple[Tensor, FeatureCache]:
        """The middle and the moments, of whole frames."""
        mid_past, out_past = past or (None, None)
        x, mid_past, rows = self.mid_block.step(x, mid_past, rows)
        x, out_past, _ = self.conv_out.step(x, out_past, rows, self.norm_out)
        return x, (mid_past, out_past)


class UpBlock(nn.Module):
    """Residual blocks, then an upsampling except at the last level."""

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
            entering = in_dim if level == 0 else in_dim // 2  # the upsampling before halved the width
            self.up_blocks.append(UpBlock(entering, out_dim, spec.num_res_blocks, upsample))
        self.norm_out = RMSNorm(dims[-1], 3)
        self.conv_out = CausalConv3d(dims[-1], 3, 3)

    def trunk(self, z: Tensor, past: FeatureCache) -> tuple[Tensor, FeatureCache]:
        """Features `[B, C, T, h, w]` before the first upsampling, of whole frames.

        Beside the middle, whose attention needs them, these are the layers of its resolution: on strips their halos would
        be large, and a strip's pixels too few for a GPU.
        """
        in_past, mid_past, layers_past = past or (None, None, None)
        x, in_past, rows = self.conv_in.step(z, in_past, Rows.whole(z.shape[-2]))
        x, mid_past, rows = self.mid_block.step(x, mid_past, rows)
        x, layers_past, _ = run(self._whole_layers, x, layers_past, rows)
        return x, (in_past, mid_past, layers_past)

    @property
    def layers(self) -> list[nn.Module]:
        """The layers between the middle and the last convolution; they see only neighbouring rows."""
        layers: list[nn.Module] = []
        for block in self.up_blocks:
            layers += [*block.resnets, *(block.upsamplers or ())]  # type: ignore[misc]
        return layers

    @property
    def mid_layers(self) -> list[nn.Module]:
        """The modules of the trunk."""
        return [self.conv_in, self.mid_block, *self._whole_layers]

    @property
    def _whole_layers(self) -> list[nn.Module]:
        """The first of them, which run on whole frames: those before any upsampling."""
        return list(cast(UpBlock, self.up_blocks[0]).resnets)

    @property
    def local_layers(self) -> list[Layer]:
        """From the first upsampling to the pixels: what may run on some rows only."""
        layers = cast(list[Layer], self.layers[len(self._whole_layers) :])
        return [*layers, NormedConv(self.norm_out, self.conv_out)]


class WanVAE(nn.Module):
    """Encoder and decoder with the latents' normalisation."""

    kernels: VAEKernels = VAE_TORCH_KERNELS
    tf32: bool | None = None
    """Whether float32 convolutions on a GPU may use TF32; None: as the process has it (see `kernels.precision`)."""

    def __init__(self, spec: VAESpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder, self.decoder = Encoder(spec), Decoder(spec)
        self.quant_conv = CausalConv3d(2 * spec.z_dim, 2 * spec.z_dim, 1)
        self.post_quant_conv = CausalConv3d(spec.z_dim, spec.z_dim, 1)

    @cached_property
    def _remembering(self) -> list[Remembers]:
        return [module for module in self.modules() if isinstance(module, Remembers)]

    def reuse_caches(self, owns: bool = True, history: Arena | None = None) -> None:
        """Let steps overwrite the past they are given. For drivers that use each past once: half the memory.

        `history`: where first pasts are put.
        """
        for module in self._remembering:
            module.reuses_cache, module.history = owns, history

    def use_kernels(self, kernels: VAEKernels) -> None:
        """Compute with these. Not between the steps of a video: what a past is, is theirs to say."""
        self.kernels = kernels
        with vae_precision(self.tf32):  # weights are prepared for it
            for module in self.modules():
                if isinstance(module, Upsample):
                    module.use_kernels(kernels)
                elif isinstance(module, AttentionBlock | CausalConv3d):
                    module.kernels = kernels

    def channels_last(self) -> None:
        """Lay weights out with channels last; activations follow. What most GPUs' convolutions are fastest in."""
        for parameter in self.parameters():
            if parameter.ndim == 5:
                parameter.data = parameter.data.to(memory_format=torch.channels_last_3d)
            elif parameter.ndim == 4 and parameter.shape[-1] > 0:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)

    def round_to_tf32(self) -> None:
        """Round convolutions' float32 weights to the nearest numbers of 11 bits, for matrix units that would cut the
        other bits off (they do not round), which makes every result a little too small."""
        for parameter in self.parameters():
            if parameter.ndim >= 4 and parameter.dtype == torch.float32 and not parameter.is_meta:
                round_to_tf32(parameter.data)

    # Decoding.

    @staticmethod
    def decodes(name: str) -> bool:
        """Whether the parameter of this name is needed to decode."""
        return name.startswith(("decoder.", "post_quant_conv."))

    @property
    def decoding_parts(self) -> tuple[nn.Module, ...]:
        """The modules that hold those."""
        return self.decoder, self.post_quant_conv

    def decode_mid(self, z: Tensor, past: FeatureCache) -> tuple[Tensor, FeatureCache]:
        """One latent frame `[B, 16, 1, h, w]` (normalised) to the trunk's features `[B, C, 1, h, w]`."""
        mean, std = self._statistics(z)
        with vae_precision(self.tf32):
            return self.decoder.trunk(self.post_quant_conv(z * std + mean), past)

    def decode_rows(
        self, mid: Tensor, past: FeatureCache, wanted: Rows, above: Halo | None = None, below: Halo | None = None
    ) -> tuple[Tensor, FeatureCache]:
        """The trunk's whole features to pixels `[B, 3, 1 or 4, rows, W]` of the wanted rows. Seams: see `run_rows`."""
        with vae_precision(self.tf32):
            x, past = run_rows(self.decoder.local_layers, mid, past, Rows.whole(mid.shape[-2]), wanted, above, below)
        return x.clamp(-1.0, 1.0), past

    def decode_step(self, z: Tensor, past: FeatureCache) -> tuple[Tensor, FeatureCache]:
        """One latent frame `[B, 16, 1, h, w]` to pixels `[B, 3, 1, H, W]` (a video's first) or `[B, 3, 4, H, W]`."""
        trunk_past, rows_past = past or (None, None)
        mid, trunk_past = self.decode_mid(z, trunk_past)
        frames, rows_past = self.decode_rows(mid, rows_past, self._all_pixel_rows(z.shape[-2]))
        return frames, (trunk_past, rows_past)

    def decode_frames(self, latents: Tensor) -> Iterator[Tensor]:
        """Latents `[B, 16, T, h, w]` to pixels, one latent frame's at a time."""
        past: FeatureCache = None
        for z in latents.split(1, dim=2):
            frames, past = self.decode_step(z, past)
            yield frames

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, 16, T, h, w]` to a whole video `[B, 3, 4T - 3, H, W]`. For training and tests."""
        return torch.cat(list(self.decode_frames(latents)), dim=2)

    # Encoding.

    def encode_step(self, frames: Tensor, past: FeatureCache, strips: int = 1) -> tuple[Tensor, FeatureCache]:
        """One frame (a video's first) or four `[B, 3, T, H, W]` to moments `[B, 32, 1, h, w]`.

        The moments are mean and log-variance, not normalised. `strips` cuts the local part by rows.
        """
        with vae_precision(self.tf32):
            return self._encode_step(frames, past, strips)

    def _encode_step(self, frames: Tensor, past: FeatureCache, strips: int) -> tuple[Tensor, FeatureCache]:
        trunk_past, local_pasts = past or (None, None)
        height = frames.shape[-2] // self.spec.spatial_stride
        layers, features, pasts = cast(list[Layer], self.encoder.local_layers), [], []
        above: Halo | None = None
        for index, wanted in enumerate(split_rows(Rows.whole(height), [1.0] * strips)):
            local_past, below = local_pasts[index] if local_pasts else None, Halo(wanted)
            x, local_past = run_rows(layers, frames, local_past, Rows.whole(frames.shape[-2]), wanted, above, below)
            features.append(x)
            pasts.append(local_past)
            above = below
        x = torch.cat(features, dim=3) if len(features) > 1 else features[0]
        moments, trunk_past = self.encoder.trunk(x, trunk_past, Rows.whole(height))
        return self.quant_conv(moments), (trunk_past, tuple(pasts))

    def encode_moments(self, video: Tensor, strips: int = 1) -> Tensor:
        """A video `[B, 3, 4n + 1, H, W]` to moments `[B, 32, n + 1, h, w]`."""
        past: FeatureCache = None
        moments = []
        for chunk in (video[:, :, :1], *video[:, :, 1:].split(4, dim=2)):
            if chunk.shape[2]:
                step, past = self.encode_step(chunk, past, strips)
                moments.append(step)
        return torch.cat(moments, dim=2)

    def encode(self, video: Tensor, strips: int = 1) -> Tensor:
        """A video `[B, 3, 4n + 1, H, W]` to normalised latents `[B, 16, n + 1, h, w]` (the posterior's mode)."""
        return self.normalize(self.encode_moments(video, strips).chunk(2, dim=1)[0])

    def normalize(self, z: Tensor) -> Tensor:
        """Latents as the encoder gives them to latents of mean 0 and standard deviation 1."""
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
    """Mean and standard deviation `[1, 16, 1, 1, 1]`; kept on the device, so that no step copies them there."""
    values = (spec.latents_mean, spec.latents_std)
    mean, std = (torch.tensor(v, dtype=dtype, device=device).view(1, -1, 1, 1, 1) for v in values)
    return mean, std
