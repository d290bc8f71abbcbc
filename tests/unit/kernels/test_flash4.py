"""What can be shown of flash-attn-4's forms without a GPU: attention once more for the rows that need it."""

import sys
from types import ModuleType

import pytest
import torch

from wanduet.kernels.attention import flash4
from wanduet.kernels.attention.backends import plain_with_lse

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def flash4_redo(interpreted) -> ModuleType:
    return interpreted("wanduet.kernels.attention.flash4_redo")


# (In bfloat16 on a GPU: tests marked gpu. The interpreter multiplies bfloat16 as integers.)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("keys", "head_dim"), [(70, 24), (64, 32), (3, 8)])
def test_only_rows_without_a_finite_sum_are_computed_again(flash4_redo, dtype, keys: int, head_dim: int) -> None:
    torch.manual_seed(0)
    q, *_ = torch.randn(2, 1100, 9, head_dim).to(dtype).split(3, dim=2)
    k, v = (torch.randn(2, keys, 3, head_dim).to(dtype) for _ in range(2))
    expected, expected_lse = plain_with_lse(q.float(), k.float(), v.float())
    out, lse = torch.full_like(expected, 7).to(dtype), torch.full_like(expected_lse, 7)
    again = torch.zeros(2, 3, 1100, dtype=torch.bool)
    for (batch, head, row), value in {
        (0, 1, 3): "inf",
        (0, 1, 1099): "-inf",
        (1, 2, 63): "nan",
        (1, 0, 1024): "inf",
    }.items():
        lse[batch, head, row] = float(value)
        again[batch, head, row] = True
    flash4_redo.redo(q, k, v, out, lse)
    tolerance = 2e-3 if dtype == torch.float16 else 1e-5
    rows = again.transpose(1, 2)
    torch.testing.assert_close(out[rows].float(), expected[rows], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse[again], expected_lse[again], rtol=1e-4, atol=1e-4)
    assert (out[~rows] == 7).all()
    assert (lse[~again] == 7).all()


def test_scores_beyond_what_an_exponential_may_be(flash4_redo) -> None:
    q, k = torch.full((1, 5, 1, 16), 10.0), torch.linspace(-40, 40, 100)[None, :, None, None].expand(1, 100, 1, 16)
    v = torch.arange(100.0)[None, :, None, None].expand(1, 100, 1, 16).contiguous()
    out, lse = torch.zeros(1, 5, 1, 16), torch.full((1, 1, 5), float("inf"))
    flash4_redo.redo(q, k.contiguous(), v, out, lse)
    torch.testing.assert_close(out, torch.full_like(out, 99.0))
    torch.testing.assert_close(lse, torch.full_like(lse, 1600.0))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, which is written in numpy
def test_rows_of_no_number_stay_so_and_alone(flash4_redo) -> None:
    q, k, v = torch.randn(3, 1, 80, 2, 16)
    q[0, 3, 1] = float("nan")
    expected, expected_lse = plain_with_lse(q, k, v)
    out, lse = torch.zeros_like(q), torch.full((1, 2, 80), float("inf"))
    flash4_redo.redo(q, k, v, out, lse)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_layout_that_cannot_be_read_is_refused(flash4_redo) -> None:
    q, k, v = torch.randn(3, 1, 16, 2, 16)
    lse = torch.full((1, 2, 16), float("inf"))
    with pytest.raises(ValueError, match="side by side"):
        flash4_redo.redo(q, k.transpose(1, 3).contiguous().transpose(1, 3), v, torch.zeros_like(q), lse)


def test_a_library_s_module_is_copied_and_left_alone() -> None:
    copy = flash4._copy_of("wanduet.kernels.dit.rope")
    copy.Rope = None
    assert sys.modules["wanduet.kernels.dit.rope"].Rope is not None
    with pytest.raises(ImportError):
        flash4._copy_of("wanduet.ops.nothing_of_that_name")
