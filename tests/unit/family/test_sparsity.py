"""What a share of keys means: blocks, steps, and what is refused."""

import pytest

from wanduet.errors import InvalidRequestError
from wanduet.family.sparsity import block_for, check_sparse, first_sparse_step, kept_blocks, kept_share


@pytest.mark.parametrize(
    ("tokens", "block"), [(75600, 128), (32760, 128), (8192, 128), (8191, 64), (2100, 32), (20, 16)]
)
def test_short_videos_have_smaller_blocks(tokens: int, block: int) -> None:
    assert block_for(tokens) == block


def test_shares_are_rounded_up_to_whole_blocks() -> None:
    assert [kept_blocks(share, 10) for share in (0.01, 0.1, 0.11, 0.3, 0.7, 1.0)] == [1, 1, 2, 3, 7, 10]
    assert kept_share(0.5, 32760) == 0.5
    assert kept_share(0.2, 32760) == 52 / 256
    assert kept_share(1.0, 32760) == 1.0


def test_the_first_quarter_of_the_steps_that_are_run_is_dense() -> None:
    assert [first_sparse_step(0, steps) for steps in (2, 3, 4, 20, 50)] == [1, 1, 1, 5, 13]
    assert first_sparse_step(30, 20) == 35  # the last 20 of 50 steps


@pytest.mark.parametrize(("share", "tokens", "steps"), [(0.5, 16, 50), (0.99, 80, 50), (0.5, 32760, 1)])
def test_what_leaves_out_nothing_is_refused(share: float, tokens: int, steps: int) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check_sparse(share, tokens, steps)
    assert (refused.value.field, refused.value.nearest) == ("sparse", 1.0)


@pytest.mark.parametrize(("share", "tokens", "steps"), [(1.0, 16, 1), (0.5, 32760, 2), (0.5, 32, 4)])
def test_what_leaves_out_keys_and_what_asks_for_none_are_allowed(share: float, tokens: int, steps: int) -> None:
    check_sparse(share, tokens, steps)
