"""A block's workspace: its parts, and how many tokens at a time it serves."""

import pytest
import torch

from wanduet.models.dit.workspace import TILE, Workspace


def workspace(tokens: int, width: int = 8, batch: int = 1) -> Workspace:
    with torch.no_grad():
        return Workspace.allocate_for(torch.empty(batch, tokens, width), torch.bfloat16)


@pytest.mark.parametrize("tokens", [1, 2, 7, 255, 256, 300, 32760, 75600])
@pytest.mark.parametrize("hidden", [24, 25, 47, 48, 100])
def test_parts_fit_and_are_few_and_even(tokens: int, hidden: int) -> None:
    made = workspace(tokens)
    assert made.whole is not None
    fit = max(1, made.whole.numel() // hidden)
    rows = made.chunk_tokens(hidden)
    assert 1 <= rows <= fit
    parts = [min(rows, tokens - start) for start in range(0, tokens, rows)]
    assert len(parts) == -(-tokens // fit)
    assert parts[0] - parts[-1] < max(TILE, len(parts)) * len(parts)


def test_parts_are_whole_tiles_where_these_fit() -> None:
    # 480p: two parts of 64 tiles each, not 66 and 63.
    assert workspace(32760, 1536).chunk_tokens(8960) == 16384


def test_parts_are_whole_parts_of_a_tile_where_only_these_fit() -> None:
    # 480p on two GPUs, with the tensor that is rounded to 8 bits beside: three parts, of which whole tiles do not fit.
    assert workspace(16380, 1536).chunk_tokens(8960 + 4480) == 5472


@pytest.mark.parametrize("batch", [1, 2])
def test_thirds_are_each_in_one_piece(batch: int) -> None:
    thirds = workspace(5, batch=batch).thirds()
    for index, third in enumerate(thirds):
        assert third is not None
        assert third.shape == (batch, 5, 8)
        assert third.is_contiguous()
        third.fill_(index)
    assert [float(third[0, 0, 0]) for third in thirds if third is not None] == [0, 1, 2]
    assert Workspace(None).thirds() == (None, None, None)
