"""Triton's kernels against the plain forms, in Triton's interpreter on the CPU."""

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from tests.packed import pack_blocks
from wanduet.family.wan21 import WAN_1_3B
from wanduet.kernels.dit import plain
from wanduet.kernels.dit.plain import Norm, QKNorm
from wanduet.kernels.dit.rope import rope_for_grid
from wanduet.models.dit.model import WanTransformer

pytest.importorskip("triton")

EPS = 1e-6
MODULE = "wanduet.kernels.dit.gpu"


@pytest.fixture(scope="module")
def kernels(interpreted) -> ModuleType:
    return interpreted(MODULE)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
    return {"rtol": bound, "atol": bound}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 96, 1536])
@pytest.mark.parametrize("rows_of_weight", [1, 2])
def test_norm(kernels, dtype, width: int, rows_of_weight: int) -> None:
    x = 3 + torch.randn(2, 9, width)
    parameters = Norm(*torch.randn(2, rows_of_weight, width), EPS)
    got = kernels.norm(x, parameters, dtype)
    assert got.dtype == dtype
    torch.testing.assert_close(got, plain.norm(x, parameters, dtype), **tolerance(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("width", [96, 128])
def test_residual_norm_on_a_chunk_of_tokens(kernels, dtype, gated: bool, width: int) -> None:
    x, y = torch.randn(2, 21, width), torch.randn(2, 21, width).to(dtype)
    gate, weight, bias = torch.randn(3, 2, width)
    norm = Norm(weight[:1], bias, EPS)
    results = []
    for implementation in (kernels, plain):
        a, b = x.clone(), y.clone()
        rows = slice(3, 20)
        a_rows, b_rows = implementation.residual_norm(a[:, rows], b[:, rows], gate if gated else None, norm)
        assert a_rows.data_ptr() == a[:, rows].data_ptr()
        assert b_rows.data_ptr() == b[:, rows].data_ptr()
        results.append((a, b))
    (x_got, n_got), (x_expected, n_expected) = results
    torch.testing.assert_close(x_got, x_expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(n_got, n_expected, **tolerance(dtype))
    assert torch.equal(x_got[:, :3], x[:, :3])
    assert torch.equal(n_got[:, 20:], y[:, 20:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 32), (2, 24), (12, 128)])
@pytest.mark.parametrize("rotated", [True, False])
def test_q_and_k_of_a_packed_buffer(kernels, dtype, heads: int, head_dim: int, rotated: bool) -> None:
    width = heads * head_dim
    packed = torch.randn(2, 10, 3 * width).to(dtype)
    q_weight, k_weight = torch.randn(2, width)
    norm = QKNorm(EPS, heads, rope_for_grid((1, 2, 5), head_dim, "cpu") if rotated else None)
    got, expected = packed.clone(), packed.clone()
    q, k, _ = got.chunk(3, dim=-1)
    q_heads, k_heads = kernels.qk_norm_rope_pair(q, k, q_weight, k_weight, norm)
    assert q_heads.shape == k_heads.shape == (2, 10, heads, head_dim)
    assert q_heads.data_ptr() == got.data_ptr()
    q, k, _ = expected.chunk(3, dim=-1)
    plain.qk_norm_rope_pair(q, k, q_weight, k_weight, norm)
    torch.testing.assert_close(got, expected, **tolerance(dtype))
    assert torch.equal(got[..., 2 * width :], packed[..., 2 * width :])


def test_one_of_q_and_k(kernels) -> None:
    q, weight = torch.randn(1, 7, 96), torch.randn(96)
    norm = QKNorm(EPS, 3, rope_for_grid((7, 1, 1), 32, "cpu"))
    expected = plain.qk_norm_rope(q.clone(), weight, norm)
    torch.testing.assert_close(kernels.qk_norm_rope(q, weight, norm), expected, rtol=1e-5, atol=1e-5)


def test_with_gradients_the_plain_forms_run(kernels) -> None:
    x = torch.randn(1, 4, 32, requires_grad=True)
    with torch.enable_grad():
        norm = Norm(torch.ones(1, 32), torch.zeros(1, 32), EPS)
        kernels.residual_norm(x, x * 2, None, norm)[1].square().sum().backward()
    assert x.grad is not None


def test_channels_that_are_apart_are_refused(kernels) -> None:
    norm = Norm(torch.ones(1, 32), torch.zeros(1, 32), EPS)
    with pytest.raises(ValueError, match="side by side"):
        kernels.norm(torch.randn(1, 4, 64)[..., ::2], norm, torch.float32)


@pytest.mark.parametrize(("num_keys", "repeats"), [(1, 5), (37, 1), (37, 400), (130, 3)])
@pytest.mark.parametrize("programs", [1, 5])
def test_attention_to_the_text(kernels, monkeypatch, num_keys: int, repeats: int, programs: int) -> None:
    from wanduet.kernels.attention import cross

    heads, head_dim = 4, 16
    q = torch.randn(2, 21, heads * head_dim)[:, 3:]
    keys, values = torch.randn(2, 2, num_keys, heads, head_dim)
    weight = torch.randn(heads * head_dim)
    monkeypatch.setattr(cross, "tile_for", lambda *_: cross.TextTile(queries=16, keys=64, programs=programs))
    got = cross.text_attention(q.clone(), weight, EPS, keys, values, repeats)
    expected = plain.text_attention(q.clone(), weight, EPS, keys, values, repeats)
    # (In bfloat16 on a GPU: tests marked gpu. The interpreter multiplies bfloat16 as integers.)
    torch.testing.assert_close(got, expected, **tolerance(torch.float32))


def test_attention_to_the_text_of_an_odd_width_is_the_plain_form(kernels) -> None:
    q, weight, (keys, values) = torch.randn(1, 5, 48), torch.randn(48), torch.randn(2, 1, 7, 2, 24)
    expected = plain.text_attention(q.clone(), weight, EPS, keys, values, 3)
    assert torch.equal(kernels.text_attention(q, weight, EPS, keys, values, 3), expected)


@pytest.mark.parametrize("packed", [True, False])
def test_a_whole_transformer_gives_the_same_with_them(kernels, packed: bool) -> None:
    """Where a block's tensors lie in its scratch is as on a GPU, guidance and shared first attention included."""
    spec = replace(
        WAN_1_3B.transformer,
        num_attention_heads=2,
        attention_head_dim=32,
        ffn_dim=300,
        num_layers=3,
        text_dim=32,
        freq_dim=32,
    )
    model = WanTransformer(spec).eval().requires_grad_(False)
    if packed:
        pack_blocks(model)
    latents, timestep = torch.randn(1, 16, 3, 6, 8), torch.tensor([400])
    texts = [model.prepare_text(torch.randn(1, 9, 32)) for _ in range(2)]
    rope = model.prepare_rope(latents.shape, latents.device)
    expected = model.forward_cfg(latents, timestep, texts, rope)
    model.runtime = dataclasses.replace(model.runtime, kernels=kernels.TRITON_KERNELS)
    for got, wanted in zip(model.forward_cfg(latents, timestep, texts, rope), expected, strict=True):
        assert (got - wanted).norm() <= 1e-4 * wanted.norm()  # PyTorch's fused GELU is the exact one on CPUs
