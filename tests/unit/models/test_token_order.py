"""The order of tokens in which consecutive ones are neighbours in the video."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from wanduet.family.wan21 import WAN_1_3B
from wanduet.models.dit.model import WanTransformer
from wanduet.models.dit.token_order import token_order


def spread(tokens: Tensor, grid: tuple[int, int, int], block: int) -> float:
    """The mean squared distance of a token from the middle of its block."""
    whole = len(tokens) // block
    place = torch.stack(torch.unravel_index(tokens[: whole * block], grid)).float().view(3, whole, block)
    return float(place.var(dim=2, correction=0).sum(0).mean())


@pytest.mark.parametrize(
    ("grid", "block", "most"),  # of a cube or a square: 6.1, 3.75, 1.34, 10.5
    [
        ((21, 30, 52), 128, 6.7),  # 480p
        ((21, 45, 80), 128, 6.6),  # 720p
        ((21, 28, 42), 64, 4.3),
        ((9, 6, 6), 16, 1.7),
        ((1, 45, 80), 64, 11.5),  # a picture
        ((7, 1, 1), 16, math.inf),
        ((1, 1, 1), 16, math.inf),
    ],
)
def test_blocks_are_compact_at_any_size(grid: tuple[int, int, int], block: int, most: float) -> None:
    order = token_order(grid, block)
    length = math.prod(grid)
    assert sorted(order.tokens.tolist()) == list(range(length))
    assert torch.equal(order.tokens[order.positions], torch.arange(length))
    if length > block:
        assert spread(order.tokens, grid, block) <= min(most, spread(torch.arange(length), grid, block))


@torch.no_grad()
@pytest.mark.parametrize("block", [16, 32])
def test_the_order_changes_only_rounding(block: int) -> None:
    torch.manual_seed(0)
    spec = replace(
        WAN_1_3B.transformer,
        num_attention_heads=2,
        attention_head_dim=24,
        ffn_dim=96,
        num_layers=2,
        text_dim=32,
        freq_dim=32,
    )
    model = WanTransformer(spec).eval()
    given = torch.randn(2, 16, 3, 6, 10), torch.tensor([400, 300]), torch.randn(2, 9, 32)
    expected = model(*given)
    seen = []

    def attend(q: Tensor, k: Tensor, v: Tensor, call: object) -> Tensor:
        seen.append(q.clone())  # its memory is used again
        return plain(q, k, v, call)

    plain = model.runtime.attention
    model.runtime = replace(model.runtime, attention=attend)
    model(*given)
    model.runtime = replace(model.runtime, token_block=block)
    torch.testing.assert_close(model(*given), expected, rtol=1e-5, atol=1e-6)
    order = token_order((3, 3, 5), block)
    assert not torch.equal(order.tokens, torch.arange(45))
    torch.testing.assert_close(seen[2], seen[0][:, order.tokens])  # of the first block: rotated as before
