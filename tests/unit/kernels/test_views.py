"""Tensors beside each other, and copies of rows."""

import pytest
import torch

from wanduet.kernels.views import copy_rows, side_by_side


def test_neighbours_are_seen_as_one() -> None:
    whole = torch.arange(24.0).view(6, 4)
    found = side_by_side(whole[:2], whole[2:3], whole[3:])
    assert found is not None
    assert found.data_ptr() == whole.data_ptr()
    torch.testing.assert_close(found, whole)
    assert side_by_side(whole[:2], whole[3:]) is None
    assert side_by_side(whole[:2], whole[2:].clone()) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [8, 5, 1])
@pytest.mark.parametrize("heads", [slice(0, 2), slice(1, 3)])
@pytest.mark.parametrize("start", [0, 3])
def test_rows_are_copied_whatever_lies_between_them(
    dtype: torch.dtype, channels: int, heads: slice, start: int
) -> None:
    source = torch.randn(1, 7, 4, channels).to(dtype)[:, start:, heads]
    whole = torch.zeros(1, 9, 6, channels, dtype=dtype)
    expected = whole.clone()
    expected[:, start : start + source.shape[1], 3:5] = source
    copy_rows(whole[:, start : start + source.shape[1], 3:5], source)
    assert torch.equal(whole, expected)


def test_rows_of_another_order_are_copied_too() -> None:
    source, target = torch.randn(3, 4, 5, 8).permute(3, 1, 2, 0), torch.empty(8, 4, 5, 3)
    copy_rows(target, source)
    assert torch.equal(target, source)
