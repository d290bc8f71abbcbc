"""What goes to quack's products, by a stand-in for them, and what does not."""

import pytest
import torch
import torch.nn.functional as F

from wanduet.kernels.dit import plain, quack
from wanduet.kernels.dit.weight import Weight


@pytest.fixture
def seen(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of what quack was given; it computes as quack does."""
    shapes: list[tuple[int, ...]] = []

    def multiply(x, weight, bias, activation, postact_out) -> None:
        shapes.append(tuple(x.shape))
        y = x @ weight + bias
        postact_out.copy_(
            y if activation is None else F.gelu(y, approximate=activation[len("gelu_") : -len("_approx")])
        )

    monkeypatch.setattr(quack, "_gemm", lambda: multiply)
    return shapes


def draw(batch: int = 2, width: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(batch, 13, width)[:, 2:-4], torch.randn(24, width), torch.randn(24)


@pytest.mark.parametrize("name", ["linear", "linear_gelu"])
@pytest.mark.parametrize("given", [True, False])
@torch.no_grad()
def test_each_of_a_batch_is_a_product(seen, name: str, given: bool) -> None:
    x, weight, bias = draw()
    out = torch.zeros(2, 9, 24)[:, 1:8] if given else None
    got = getattr(quack, name)(x, Weight(weight), bias, out)
    torch.testing.assert_close(got, getattr(plain, name)(x, Weight(weight), bias), rtol=1e-5, atol=1e-6)
    assert got is out or not given
    assert seen == [(7, 16), (7, 16)]


@pytest.mark.parametrize("name", ["linear", "linear_gelu"])
def test_with_gradients_the_plain_forms_run(seen, name: str) -> None:
    x, weight, bias = draw()
    getattr(quack, name)(x, Weight(weight.requires_grad_()), bias, None).sum().backward()
    assert weight.grad is not None
    assert seen == []


@torch.no_grad()
def test_what_the_copy_engine_cannot_reach_is_computed_plainly(seen) -> None:
    x, weight, bias = draw(width=18)  # rows of 72 bytes
    torch.testing.assert_close(quack.linear(x, Weight(weight), bias), F.linear(x, weight, bias))
    x, weight, bias = draw()
    moved = torch.randn(x.numel() + 1)[1:].view(x.shape)  # begins at byte 4
    torch.testing.assert_close(quack.linear(moved, Weight(weight), bias), F.linear(moved, weight, bias))
    apart = torch.randn(2, 7, 32)[..., ::2]
    torch.testing.assert_close(quack.linear(apart, Weight(weight), bias), F.linear(apart, weight, bias))
    assert seen == []
