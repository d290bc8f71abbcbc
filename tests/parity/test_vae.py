"""The VAE against diffusers' on seeded random small models, float32 on the CPU."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from diffusers import AutoencoderKLWan

from wanduet.family.wan21 import WAN_1_3B
from wanduet.models.vae.encode import encode_stream
from wanduet.models.vae.model import WanVAE
from wanduet.models.vae.rows import Rows, split_rows
from wanduet.models.vae.tiles import Halo

CONFIGS = {
    "wan": dict(base_dim=8, z_dim=16),
    "narrow": dict(base_dim=6, z_dim=16, dim_mult=[1, 2, 2, 3], num_res_blocks=1),
    "other-times": dict(base_dim=8, z_dim=16, temperal_downsample=[True, True, False]),
}


@pytest.fixture(params=CONFIGS, scope="module")
def oracle(request) -> AutoencoderKLWan:
    torch.manual_seed(0)
    model = AutoencoderKLWan(**CONFIGS[request.param])
    for name, parameter in model.named_parameters():
        if "gamma" in name:  # its default, 1, would hide mistakes
            parameter.data = parameter.data + 0.3 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vae(oracle) -> WanVAE:
    model = WanVAE(WAN_1_3B.vae.with_config(oracle.config))
    model.load_state_dict(oracle.state_dict(), strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def whole(vae) -> Callable[[torch.dtype], tuple[torch.Tensor, torch.Tensor]]:
    """Latents and their decode in one piece."""

    @cache
    @torch.no_grad()
    def decoded(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        z = latents(3, 10, 4).to(dtype)
        return z, vae.to(dtype).decode(z)

    return decoded


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def denormalize(oracle, latents: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor(oracle.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(oracle.config.latents_std).view(1, -1, 1, 1, 1)
    return latents * std + mean


def latents(frames: int, rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(1, 16, frames, rows, columns, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 3, 2), (2, 5, 4), (5, 4, 6)])
def test_decode_equals_diffusers(oracle, vae, shape) -> None:
    z = latents(*shape)
    expected = oracle.decode(denormalize(oracle, z), return_dict=False)[0]
    assert relative(vae.decode(z), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 24, 16), (5, 40, 32), (17, 32, 48)])
def test_encode_equals_diffusers(oracle, vae, shape) -> None:
    video = torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(2)) * 2 - 1
    expected = oracle.encode(video, return_dict=False)[0]
    assert relative(vae.encode_moments(video), expected.parameters) < 1e-5
    assert relative(denormalize(oracle, vae.encode(video)), expected.mode()) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("num_tiles", [1, 2, 3, 9])
def test_streamed_encode_equals_diffusers(oracle, vae, num_tiles: int) -> None:
    frames = torch.randint(0, 256, (13, 72, 24, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    chunks = (chunk.numpy() for chunk in (frames[:1], *frames[1:].split(4)))
    got = encode_stream(vae, chunks, num_tiles)
    video = frames.permute(3, 0, 1, 2)[None] / 127.5 - 1
    assert relative(denormalize(oracle, got[None]), oracle.encode(video).latent_dist.mode()) < 1e-5
    assert relative(got, vae.encode(video)[0]) < 1e-5


def test_training_gives_the_same_and_has_gradients(oracle, vae) -> None:
    z = latents(3, 4, 4)
    with torch.no_grad():
        expected = vae.decode(z)
    z.requires_grad_(True)
    got = vae.decode(z)
    assert relative(got.detach(), expected) < 1e-5
    got.square().mean().backward()
    assert z.grad is not None
    assert z.grad.abs().min() > 0
    video = torch.rand(1, 3, 5, 16, 16)
    vae.encode(video).square().mean().backward()
    assert all(p.grad is not None for n, p in vae.named_parameters() if not n.startswith("decoder.conv_out.none"))
    vae.zero_grad()


@torch.no_grad()
def test_interleaved_videos_do_not_touch(vae) -> None:
    first, second = latents(3, 4, 4, seed=1), latents(3, 4, 4, seed=2)
    alone = vae.decode(first)
    caches, chunks = [None, None], []
    for t in range(3):
        for i, video in enumerate((first, second)):
            frames, caches[i] = vae.decode_step(video[:, :, t : t + 1], caches[i])
            if i == 0:
                chunks.append(frames)
    assert torch.equal(torch.cat(chunks, dim=2), alone)


@torch.no_grad()
@pytest.mark.parametrize("num_tiles", [2, 3, 5])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize("joined", [True, False])
def test_decoded_tiles_are_exact(vae, whole, num_tiles: int, dtype: torch.dtype, limit: float, joined: bool) -> None:
    """Exact as mathematics (float64); in float32 the convolution kernels sum in another order for other heights."""
    z, expected = whole(dtype)
    vae.to(dtype)
    chunks, mid_cache, caches = [], None, [None] * num_tiles
    tiles = split_rows(Rows.whole(80), [1.0] * num_tiles)
    halos = [None, *(Halo(tile) if joined else None for tile in tiles[:-1]), None]
    for frame in z.split(1, dim=2):
        mid, mid_cache = vae.decode_mid(frame, mid_cache)
        parts = []
        for i, wanted in enumerate(tiles):
            part, caches[i] = vae.decode_rows(mid, caches[i], wanted, *halos[i : i + 2])
            parts.append(part)
        chunks.append(torch.cat(parts, dim=3))
    vae.to(torch.float32)
    assert relative(torch.cat(chunks, dim=2), expected) < limit


@torch.no_grad()
@pytest.mark.parametrize("num_tiles", [2, 3])
def test_encoded_tiles_are_exact(vae, num_tiles: int) -> None:
    video = torch.rand(1, 3, 9, 96, 24) * 2 - 1
    assert relative(vae.encode_moments(video, num_tiles), vae.encode_moments(video)) < 1e-6
