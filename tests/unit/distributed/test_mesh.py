"""Layouts of ranks, and the lengths of their parts."""

import pytest

from wanduet.distributed.mesh import Layout, choose_layout
from wanduet.distributed.split import split_lengths
from wanduet.errors import ConfigError


@pytest.mark.parametrize(
    ("world_size", "num_heads", "uses_guidance", "expected"),
    [
        (1, 12, True, Layout(1, 1, 1)),
        (2, 12, True, Layout(2, 1, 1)),
        (2, 12, False, Layout(1, 1, 2)),
        (3, 12, True, Layout(1, 1, 3)),
        (4, 12, True, Layout(2, 1, 2)),
        (4, 12, False, Layout(1, 1, 4)),
        (5, 12, False, Layout(1, 5, 1)),
        (8, 12, True, Layout(2, 1, 4)),
        (8, 12, False, Layout(1, 2, 4)),
        (8, 40, False, Layout(1, 1, 8)),
        (6, 3, False, Layout(1, 2, 3)),
    ],
)
def test_layout_uses_all_ranks_and_divides_the_heads(
    world_size: int, num_heads: int, uses_guidance: bool, expected: Layout
) -> None:
    layout = choose_layout(world_size, num_heads, uses_guidance)
    assert layout == expected
    assert layout.world_size == world_size
    assert num_heads % layout.ulysses == 0


def test_nonsense_is_refused() -> None:
    with pytest.raises(ConfigError):
        choose_layout(0, 12, True)
    with pytest.raises(ConfigError):
        Layout(cfg=3)
    with pytest.raises(ConfigError):
        Layout(ring=0)


@pytest.mark.parametrize(("length", "shares", "expected"), [
    (32760, (1.0,) * 4, (8192, 8192, 8192, 8184)),
    (32760, (1.0, 3.0), (8192, 24568)),
    (300, (1.0,) * 2, (256, 44)),
    (100, (1.0,) * 2, (0, 100)),
])  # fmt: skip
def test_parts_of_whole_blocks(length: int, shares: tuple[float, ...], expected: tuple[int, ...]) -> None:
    assert split_lengths(length, shares, 128) == expected


@pytest.mark.parametrize("length", [0, 1, 2, 7, 32760, 75601])
@pytest.mark.parametrize("shares", [(1.0,), (1.0,) * 3, (1.0,) * 7, (0.1, 0.2, 0.7), (3.0, 1.0)])
def test_lengths_add_up_and_follow_the_shares(length: int, shares: tuple[float, ...]) -> None:
    lengths = split_lengths(length, shares)
    assert sum(lengths) == length
    assert all(abs(n - length * share / sum(shares)) < 1.001 for n, share in zip(lengths, shares, strict=True))
