"""The plain forms: functional with gradients, in place and in chunks without."""

import pytest
import torch
import torch.nn.functional as F

from wanduet.kernels.dit import plain
from wanduet.kernels.dit.plain import Norm, QKNorm
from wanduet.kernels.dit.rope import rope_for_grid, rotate
from wanduet.kernels.dit.weight import Weight

EPS = 1e-6


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(plain, "CHUNK_TOKENS", 4)


def test_norm_is_a_modulated_layer_norm() -> None:
    x, scale, shift = torch.randn(2, 9, 32), torch.randn(2, 32), torch.randn(2, 32)
    expected = F.layer_norm(x, (32,), eps=EPS) * (1 + scale[:, None]) + shift[:, None]
    with torch.no_grad():
        torch.testing.assert_close(plain.norm(x, Norm(1 + scale, shift, EPS), torch.float32), expected)
    torch.testing.assert_close(plain.norm(x, Norm(1 + scale, shift, EPS), torch.float32), expected)


@pytest.mark.parametrize("gated", [True, False])
def test_in_place_equals_functional(gated: bool) -> None:
    x, y = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    gate, weight, bias = torch.randn(3, 2, 32)
    before = x.clone(), y.clone()
    expected = plain.residual_norm(x, y, gate if gated else None, Norm(weight, bias, EPS))
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    with torch.no_grad():
        got = plain.residual_norm(x, y, gate if gated else None, Norm(weight, bias, EPS))
    assert got[0] is x
    assert got[1] is y
    torch.testing.assert_close(got, expected)


def test_q_and_k_are_normed_over_all_heads_and_rotated() -> None:
    packed = torch.randn(1, 10, 3 * 48)
    rope = rope_for_grid((2, 1, 5), 24, "cpu")
    q_weight, k_weight = torch.randn(2, 48)
    q, k, _ = packed.chunk(3, dim=-1)
    expected = [
        rotate(F.rms_norm(x, (48,), w, EPS).unflatten(-1, (2, 24)), rope) for x, w in ((q, q_weight), (k, k_weight))
    ]
    torch.testing.assert_close(
        plain.qk_norm_rope_pair(q, k, q_weight, k_weight, QKNorm(EPS, 2, rope)), tuple(expected), rtol=1e-5, atol=1e-5
    )
    with torch.no_grad():
        got = plain.qk_norm_rope_pair(q, k, q_weight, k_weight, QKNorm(EPS, 2, rope))
    torch.testing.assert_close(got, tuple(expected), rtol=1e-5, atol=1e-5)
    assert got[0].data_ptr() == packed.data_ptr()


def test_gelu_is_the_tanh_form() -> None:
    x, weight, bias = torch.randn(1, 5, 16), torch.randn(24, 16), torch.randn(24)
    expected = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    with torch.no_grad():
        torch.testing.assert_close(plain.linear_gelu(x, Weight(weight), bias), expected)
    assert not torch.allclose(F.gelu(F.linear(x, weight, bias)), expected, atol=1e-5)
