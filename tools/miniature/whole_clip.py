"""The VAE on whole clips, with gradients: equal to the streaming form in a tenth of the kernel launches.

Training needs no streaming, so each layer runs once over all frames. Convolutions are causal by the same zero padding,
and the first frame bypasses the temporal resampling, as in the streaming form. A test compares both forms.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanduet.models.vae.layers import AttentionBlock, CausalConv3d, Downsample, ResidualBlock, RMSNorm, Upsample
from wanduet.models.vae.model import MidBlock, WanVAE


def encode_moments(vae: WanVAE, video: Tensor) -> Tensor:
    """A video `[B, 3, 4n + 1, H, W]` to moments `[B, 32, n + 1, h, w]`, as `WanVAE.encode_moments`."""
    encoder = vae.encoder
    x = _conv(encoder.conv_in, video)
    for layer in encoder.down_blocks:
        x = _downsample(layer, x) if isinstance(layer, Downsample) else _residual(cast(ResidualBlock, layer), x)
    x = _middle(encoder.mid_block, x)
    return _conv(vae.quant_conv, _conv(encoder.conv_out, x, encoder.norm_out))


def decode_raw(vae: WanVAE, z: Tensor) -> Tensor:
    """Latents before normalisation `[B, 16, T, h, w]` to a video `[B, 3, 4T - 3, H, W]`, not clamped."""
    decoder = vae.decoder
    x = _middle(decoder.mid_block, _conv(decoder.conv_in, _conv(vae.post_quant_conv, z)))
    for layer in decoder.layers:
        x = _upsample(layer, x) if isinstance(layer, Upsample) else _residual(cast(ResidualBlock, layer), x)
    return _conv(decoder.conv_out, x, decoder.norm_out)


def encode(vae: WanVAE, video: Tensor) -> Tensor:
    """A video to normalised latents, as `WanVAE.encode`."""
    return vae.normalize(encode_moments(vae, video).chunk(2, dim=1)[0])


def decode(vae: WanVAE, latents: Tensor) -> Tensor:
    """Normalised latents to a video in [-1, 1], as `WanVAE.decode`."""
    shape = (1, -1, 1, 1, 1)
    mean, std = (
        torch.tensor(v, device=latents.device).view(shape) for v in (vae.spec.latents_mean, vae.spec.latents_std)
    )
    return decode_raw(vae, latents * std + mean).clamp(-1.0, 1.0)


def _conv(layer: CausalConv3d, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
    if norm is not None:
        x = norm_silu(x, norm.gamma)
    before, rows, columns = layer.kernel_size[0] - 1, layer.kernel_size[1] // 2, layer.kernel_size[2] // 2
    if before:
        x = F.pad(x, (0, 0, 0, 0, before, 0))
    weight, bias = layer.weight.to(x.dtype), cast(Tensor, layer.bias).to(x.dtype)
    if x.is_cuda:  # faster on an H100: 51 instead of 55 ms a step
        x = x.contiguous(memory_format=torch.channels_last_3d)
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
    return F.conv3d(x, weight, bias, padding=(0, rows, columns))


def _norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """RMSNorm over channels and SiLU, in float32 inside."""
    wide = x.float()
    scale = (wide.square().sum(dim=1, keepdim=True) + 1e-12).rsqrt() * x.shape[1] ** 0.5
    return F.silu(wide * scale * gamma).to(x.dtype)


norm_silu = _norm_silu


def compile_norm() -> None:
    """Fuse the norm into one kernel: it then keeps only its input for the backward pass. For a GPU."""
    global norm_silu
    torch._dynamo.config.cache_size_limit = 64  # one kernel for each of the VAE's shapes
    norm_silu = torch.compile(_norm_silu, dynamic=False)


def _residual(layer: ResidualBlock, x: Tensor) -> Tensor:
    inner = _conv(layer.conv2, _conv(layer.conv1, x, layer.norm1), layer.norm2)
    shortcut = layer.conv_shortcut
    return inner + (_conv(shortcut, x) if isinstance(shortcut, CausalConv3d) else x)


def _attention(layer: AttentionBlock, x: Tensor) -> Tensor:
    frames, (batch, channels, length, height, width) = _images(x), x.shape
    wide = frames.float()
    scale = (wide.square().sum(dim=1, keepdim=True) + 1e-12).rsqrt() * channels**0.5
    normed = (wide * scale * layer.norm.gamma).to(x.dtype)
    q, k, v = _conv2d(layer.to_qkv, normed).flatten(2).transpose(1, 2).chunk(3, dim=-1)
    heads = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    out = _conv2d(layer.proj, heads.transpose(1, 2).unflatten(2, (height, width)))
    return x + out.unflatten(0, (batch, length)).transpose(1, 2)


def _middle(block: MidBlock, x: Tensor) -> Tensor:
    first, second = (cast(ResidualBlock, layer) for layer in block.resnets)
    return _residual(second, _attention(cast(AttentionBlock, block.attentions[0]), _residual(first, x)))


def _downsample(layer: Downsample, x: Tensor) -> Tensor:
    batch, length = x.shape[0], x.shape[2]
    conv, time_conv = cast(nn.Conv2d, layer.resample[1]), layer.time_conv
    images = _conv2d(conv, F.pad(_images(x), (0, 1, 0, 1)), stride=2)
    x = images.unflatten(0, (batch, length)).transpose(1, 2)
    if time_conv is None:
        return x
    weight, bias = time_conv.weight.to(x.dtype), cast(Tensor, time_conv.bias).to(x.dtype)
    return torch.cat((x[:, :, :1], F.conv3d(x, weight, bias, stride=(2, 1, 1))), dim=2)


def _upsample(layer: Upsample, x: Tensor) -> Tensor:
    if layer.time_conv is not None:
        pairs = _conv(layer.time_conv, x[:, :, 1:]).unflatten(1, (2, x.shape[1]))
        x = torch.cat((x[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)), dim=2)
    batch, length = x.shape[0], x.shape[2]
    doubled = _images(x).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    images = _conv2d(cast(nn.Conv2d, layer.resample[1]), doubled, padding=1)
    return images.unflatten(0, (batch, length)).transpose(1, 2)


def _conv2d(layer: nn.Conv2d, images: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    weight, bias = layer.weight.to(images.dtype), cast(Tensor, layer.bias).to(images.dtype)
    if images.is_cuda:
        images = images.contiguous(memory_format=torch.channels_last)
        weight = weight.contiguous(memory_format=torch.channels_last)
    return F.conv2d(images, weight, bias, stride=stride, padding=padding)


def _images(x: Tensor) -> Tensor:
    """`[B, C, T, H, W]` to `[B * T, C, H, W]`."""
    return x.transpose(1, 2).flatten(0, 1)
