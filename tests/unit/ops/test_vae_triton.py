"""The VAE's Triton kernel against its plain form, in Triton's interpreter on the CPU."""

from types import ModuleType

import pytest
import torch

from wanduet.models.vae import WanVAE
from wanduet.models.vae_rows import DecodePlan
from wanduet.models.vae_stream import decode_stream
from wanduet.ops import vae_fused
from wanduet.specs import VAESpec

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def kernels(interpreted) -> ModuleType:
    return interpreted("wanduet.ops.vae_triton")


def clip(channels: int, frames: int, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(1, channels, frames, rows, columns).to(dtype)
    return x.to(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("channels", [3, 16, 24])
@pytest.mark.parametrize("pads", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize(
    ("frames", "has_past", "has_norm"), [(2, True, True), (2, False, True), (2, True, False), (0, False, True)]
)
def test_equals_the_plain_form(kernels, channels, pads, frames, has_past, has_norm) -> None:
    torch.manual_seed(0)
    x = clip(channels, 2, 5, 7)
    past = clip(channels, frames, 5 + sum(pads), 7) if has_past else None
    gamma = torch.randn(channels, 1, 1, 1) if has_norm else None
    with torch.no_grad():
        got = kernels.causal_input(x, past, pads, frames, gamma)
        expected = vae_fused.causal_input(x, past, pads, frames, gamma)
    assert got.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_takes_slices_of_larger_tensors(kernels) -> None:
    torch.manual_seed(1)
    x, past, gamma = clip(8, 3, 9, 6)[:, :, :, 2:7], clip(8, 4, 6, 6)[:, :, -2:], torch.randn(8, 1, 1, 1)
    with torch.no_grad():
        got = kernels.causal_input(x, past, (1, 0), 2, gamma)
        torch.testing.assert_close(got, vae_fused.causal_input(x, past, (1, 0), 2, gamma), rtol=1e-5, atol=1e-6)


def test_a_pixel_of_zeros_stays_zero(kernels) -> None:
    with torch.no_grad():
        got = kernels.causal_input(clip(8, 1, 2, 2) * 0, None, (0, 0), 2, torch.ones(8, 1, 1, 1))
    assert not got.any()


def test_other_layouts_go_to_the_plain_form(kernels) -> None:
    x, gamma = torch.randn(1, 8, 1, 3, 4), torch.randn(8, 1, 1, 1)
    with torch.no_grad():
        got = kernels.causal_input(x, None, (0, 0), 2, gamma)
        assert torch.equal(got, vae_fused.causal_input(x, None, (0, 0), 2, gamma))


@pytest.mark.parametrize("plan", [DecodePlan(), DecodePlan("strip", 2)])
def test_a_whole_decode_in_channels_last_gives_the_same_frames(kernels, plan) -> None:
    torch.manual_seed(2)
    vae = WanVAE(VAESpec(base_dim=8, num_res_blocks=1)).eval().requires_grad_(False)
    latents = torch.randn(16, 3, 4, 4)
    expected = [chunk.copy() for chunk in decode_stream(vae, latents, plan)]
    vae.channels_last()
    vae.use_kernels(kernels.VAE_TRITON_KERNELS)
    for got, want in zip(decode_stream(vae, latents, plan), expected, strict=True):
        assert abs(got.astype(int) - want.astype(int)).max() <= 1


def test_the_check_before_use_sees_a_wrong_kernel(kernels) -> None:
    from wanduet.ops.kernels import largest_vae_error
    from wanduet.ops.vae_fused import VAEKernels

    cpu = torch.device("cpu")
    assert largest_vae_error(kernels.VAE_TRITON_KERNELS, cpu, torch.float32) < 1e-5
    wrong = VAEKernels("wrong", lambda *inputs: kernels.causal_input(*inputs) * 1.01)
    assert largest_vae_error(wrong, cpu, torch.float32) > 5e-3
