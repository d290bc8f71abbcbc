"""Sparse attention: the plain form against the masked definition, Triton's in its interpreter against the plain form."""

from dataclasses import replace
from itertools import accumulate, pairwise
from types import ModuleType

import pytest
import torch
from torch import Tensor

from wanduet.errors import ConfigError
from wanduet.kernels.attention import key_lists, sparse
from wanduet.kernels.attention.backends import plain_with_lse
from wanduet.kernels.attention.sparse import Blocks, KeyLists, plain_listed
from wanduet.kernels.attention.sparse_steps import ListedBackend, choose_listed


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def random_lists(
    heads: int, query_starts: Tensor, key_starts: Tensor, sizes: tuple[int, int], uniform: bool
) -> KeyLists:
    """Lists of different lengths, one of them empty, with numbers of no block behind their ends."""
    rows, columns = len(query_starts) - 1, len(key_starts) - 1
    count = torch.randint(1, columns + 1, (2, heads, rows), dtype=torch.int32)
    count[0, 0, 0] = 0
    index = torch.stack([torch.randperm(columns) for _ in range(2 * heads * rows)]).view(2, heads, rows, columns).int()
    is_listed = torch.arange(columns) < count[..., None]
    index = torch.where(is_listed, index, columns).sort(dim=-1).values
    index = torch.where(is_listed, index, 10**6).contiguous()
    if uniform:
        return KeyLists(count, index, *sizes)
    return KeyLists(count, index, *sizes, blocks_of(query_starts, sizes[0]), blocks_of(key_starts, sizes[1]))


def blocks_of(starts: Tensor, size: int) -> Blocks:
    return Blocks(starts, sum(accumulate((starts.diff().flip(0) < size).int().tolist(), max)))


def masked(q: Tensor, k: Tensor, v: Tensor, lists: KeyLists, query_starts: Tensor, key_starts: Tensor):
    """Attention by its definition, with the scores of all pairs."""
    scores = torch.einsum("blhd,bshd->bhls", q.float(), k.float()) * q.shape[-1] ** -0.5
    for (b, h, m), count in ((place, int(lists.count[place])) for place in places(lists.count)):
        rows = slice(int(query_starts[m]), int(query_starts[m + 1]))
        may = torch.zeros(k.shape[1], dtype=torch.bool)
        for block in lists.index[b, h, m, :count].tolist():
            may[int(key_starts[block]) : int(key_starts[block + 1])] = True
        scores[b, h, rows, ~may] = -torch.inf
    weights = scores.softmax(-1).nan_to_num(0.0)  # of no key at all: zeros
    return torch.einsum("bhls,bshd->blhd", weights, v.float()), scores.logsumexp(-1)


def places(count: Tensor) -> list[tuple[int, ...]]:
    return [tuple(place) for place in torch.ones_like(count).nonzero().tolist()]


SHAPES = {
    # tokens of each block of queries and keys; sizes; whether all have the size but the last one
    "uniform, ragged ends": ([32, 32, 7], [32, 32, 32, 5], (32, 32), True),
    "a tile is a part of a block": ([160, 40], [96, 96, 33], (160, 96), True),
    "one block": ([9], [11], (16, 16), True),
    "tiles of a video, cut at its sides": ([24, 12, 24, 6], [8, 1, 12, 24], (24, 24), False),
    "whole tiles behind short ones": ([32, 5], [7, 20, 32, 32, 32], (32, 32), False),
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def case(request):
    torch.manual_seed(0)
    query_tokens, key_tokens, sizes, uniform = request.param
    query_starts, key_starts = (torch.tensor([0, *tokens]).cumsum(0).int() for tokens in (query_tokens, key_tokens))
    # Slices of one buffer, as the projection of q, k and v writes them.
    q = torch.randn(2, sum(query_tokens), 2 * 24).unflatten(-1, (2, 24))
    k, v = (x.unflatten(-1, (2, 24)) for x in torch.randn(2, sum(key_tokens), 4 * 24).chunk(2, dim=-1))
    lists = random_lists(2, query_starts, key_starts, sizes, uniform)
    return (q, k, v, lists), masked(q, k, v, lists, query_starts, key_starts)


def test_plain_form_is_the_masked_definition(case, monkeypatch) -> None:
    inputs, expected = case
    torch.testing.assert_close(plain_listed(*inputs), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(sparse, "PLAIN_BYTES", 1)  # a block of queries at a time
    torch.testing.assert_close(sparse.sparse_attention_with_lse(*inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def sparse_gpu(interpreted) -> ModuleType:
    return interpreted("wanduet.kernels.attention.sparse_gpu")


@pytest.fixture(scope="module")
def key_lists_gpu(interpreted) -> ModuleType:
    return interpreted("wanduet.kernels.attention.key_lists_gpu")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter: the logarithm of 0
def test_triton_kernel_is_the_masked_definition(case, sparse_gpu) -> None:
    inputs, expected = case
    torch.testing.assert_close(sparse_gpu.attend_listed(*inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rows_without_a_finite_sum_alone_are_computed_again(case, sparse_gpu) -> None:
    inputs, (expected, expected_lse) = case
    out, lse = torch.full_like(expected, 7), torch.full_like(expected_lse, 7)
    again = torch.zeros_like(lse, dtype=torch.bool)
    again[0, 1, ::5], again[1, 0, -1] = True, True
    lse[again] = torch.inf
    lse[1, 0, -1] = torch.nan
    sparse_gpu.redo_listed(*inputs, out, lse)
    rows = again.transpose(1, 2)
    torch.testing.assert_close(out[rows], expected[rows], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[again], expected_lse[again], rtol=1e-5, atol=1e-5)
    assert (out[~rows] == 7).all()
    assert (lse[~again] == 7).all()


def test_entries_of_short_blocks_are_counted() -> None:
    lists = KeyLists(ints(2, 0, 3).view(1, 1, 3), ints(0, 3, 0, 1, 1, 1, 0, 1, 2).view(1, 1, 3, 3))
    blocks = Blocks(ints(0, 3, 6, 14, 22), 2)
    assert replace(lists, key_blocks=blocks).short_count().flatten().tolist() == [1, 0, 2]


def test_triton_kernel_in_half_precision(sparse_gpu) -> None:
    q, k, v = torch.randn(3, 1, 200, 2, 32).half()
    lists = KeyLists(ints(2, 1, 1, 2).view(1, 2, 2), ints(0, 1, 1, 9, 0, 9, 0, 1).view(1, 2, 2, 2))
    out, lse = sparse_gpu.attend_listed(q, k, v, lists)
    expected, expected_lse = plain_listed(q.float(), k.float(), v.float(), lists)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)


def test_triton_kernel_refuses_a_layout_that_it_cannot_read(sparse_gpu) -> None:
    q, k, v = torch.randn(3, 1, 16, 2, 16)
    lists = KeyLists(ints(1, 1).view(1, 2, 1), ints(0, 0).view(1, 2, 1, 1))
    with pytest.raises(ValueError, match="side by side"):
        sparse_gpu.attend_listed(q, k.transpose(1, 3).contiguous().transpose(1, 3), v, lists)


def test_gradients_pass_through_the_plain_form() -> None:
    q, k, v = (torch.randn(1, 12, 1, 4, requires_grad=True) for _ in range(3))
    lists = KeyLists(ints(1, 1).view(1, 1, 2), ints(0, 1).view(1, 1, 2, 1), 8, 8)
    sparse.sparse_attention_with_lse(q, k, v, lists)[0][:, :8].sum().backward()
    assert v.grad[:, :8].abs().sum() > 0
    assert v.grad[:, 8:].abs().sum() == 0


@pytest.mark.parametrize("starts", [None, [0, 64, 70, 130]])
def test_pooled_blocks_are_means_of_their_tokens(key_lists_gpu, starts: list[int] | None) -> None:
    x = torch.randn(2, 130, 6, 24)[:, :, ::2]
    bounds = starts or [0, 64, 128, 130]
    expected = torch.stack([x[:, a:b].mean(1) for a, b in pairwise(bounds)], dim=2)
    given = None if starts is None else ints(*starts)
    torch.testing.assert_close(key_lists.pool_blocks(x, 64, given), expected)
    torch.testing.assert_close(key_lists_gpu.pool_blocks(x, 64, given), expected)


def test_moments_of_blocks(key_lists_gpu) -> None:
    x = torch.randn(2, 130, 6, 24)[:, :, ::2]
    parts = [x[:, 0:64], x[:, 64:128], x[:, 128:130]]
    mean = torch.stack([part.mean(1) for part in parts], dim=2)
    square = torch.stack([part.square().mean(1) for part in parts], dim=2)
    variance = torch.stack([part.var(1, correction=0) for part in parts], dim=2)
    for moments, expected in (
        (key_lists.Moments(0.5, 3.0), (mean * 0.5, square * 3.0)),
        (key_lists.Moments(centred=True), (mean, variance)),
    ):
        whole = torch.cat(expected, dim=-1)
        torch.testing.assert_close(key_lists.block_moments(x, 64, moments), whole, rtol=1e-4, atol=1e-5)
        given = moments.mean, moments.square, moments.centred
        torch.testing.assert_close(key_lists_gpu.block_moments(x, 64, given), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("columns", "kept"), [(37, 9), (16, 16), (300, 1)])
def test_highest_scores_are_kept_in_ascending_order(key_lists_gpu, columns: int, kept: int) -> None:
    torch.manual_seed(1)
    scores = torch.randn(1, 1, 5, columns)
    scores[0, 0, 0] = 1.0  # of equal ones, the first
    scores[0, 0, 1, ::2] = scores[0, 0, 1, 1]
    scores[0, 0, 4, 3] = torch.inf
    scores[0, 0, 2] = -scores[0, 0, 2].abs()
    count, index = key_lists.highest_blocks(scores, kept)
    assert (count == kept).all()
    assert (index.dtype, count.dtype) == (torch.int32, torch.int32)
    assert index[0, 0, 0].tolist() == list(range(kept))
    assert (index.diff(dim=-1) > 0).all()
    best = scores.topk(kept, dim=-1).values
    torch.testing.assert_close(scores.gather(-1, index.long()).sort(dim=-1, descending=True).values, best)
    assert torch.equal(key_lists_gpu.highest_blocks(scores, kept), index)


def test_scores_of_blocks(key_lists_gpu) -> None:
    q, k = torch.randn(2, 3, 40, 24), torch.randn(2, 3, 70, 24)
    torch.testing.assert_close(key_lists_gpu.block_scores(q, k), key_lists.block_scores(q, k), rtol=1e-5, atol=1e-5)


def test_the_blocks_that_matter_are_listed() -> None:
    """Keys of one block look like the queries of another; a block's own keys are kept though they look like nothing."""
    torch.manual_seed(2)
    q, k = torch.randn(2, 1, 128 * 6 + 50, 1, 16) * 0.1
    for query_block, key_block in ((0, 4), (1, 6), (5, 0)):
        direction = torch.randn(16) * 3
        q[:, query_block * 128 : (query_block + 1) * 128] += direction
        k[:, key_block * 128 : (key_block + 1) * 128] += direction
    lists = key_lists.pooled_lists(q, k, 0.25)
    assert lists.count.shape == (1, 1, 7)
    assert lists.index.shape == (1, 1, 7, 2)
    assert lists.index[0, 0, [0, 1, 5]].tolist() == [[0, 4], [1, 6], [0, 5]]
    assert all(m in row for m, row in enumerate(lists.index[0, 0].tolist()))


def test_more_of_the_attention_is_read_than_by_means_alone() -> None:
    """Blocks of unlike keys, one of which may match, and a last block of few keys."""
    torch.manual_seed(4)
    q, k, v = torch.randn(3, 1, 16 * 12 + 3, 2, 16)
    k *= torch.linspace(0.1, 2.5, 13).repeat_interleave(16)[: k.shape[1], None, None]
    dense = sparse.sparse_attention_with_lse(q, k, v, key_lists.pooled_lists(q, k, 1.0, 16))[1]
    scores = key_lists.block_scores(key_lists.pool_blocks(q, 16), key_lists.pool_blocks(k, 16))
    scores.diagonal(0, -2, -1).fill_(torch.inf)
    by_means = KeyLists(*key_lists.highest_blocks(scores, 4), 16, 16)
    read = [
        float((sparse.sparse_attention_with_lse(q, k, v, lists)[1] - dense).exp().mean())
        for lists in (key_lists.pooled_lists(q, k, 0.3, 16), by_means)
    ]
    assert read[0] > read[1] + 0.1


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_a_rank_s_part_of_the_queries_and_heads_has_the_lists_of_the_whole(share: float) -> None:
    q, k = torch.randn(2, 1, 128 * 5 + 30, 4, 16)
    whole = key_lists.pooled_lists(q, k, share)
    part = key_lists.pooled_lists(q[:, 256:, 1:3], k[:, :, 1:3], share, first_query=256)
    assert torch.equal(part.index, whole.index[:, 1:3, 2:])
    between = key_lists.pooled_lists(q[:, 200:328], k, share, first_query=200)
    assert {1, 2} <= set(between.index[0, 0, 0].tolist())  # its tokens lie in two blocks of keys


def test_all_blocks_are_the_dense_attention() -> None:
    q, k, v = torch.randn(3, 1, 300, 2, 16)
    torch.testing.assert_close(
        sparse.sparse_attention_with_lse(q, k, v, key_lists.pooled_lists(q, k, 1.0)), plain_with_lse(q, k, v)
    )


def test_a_kernel_that_fails_or_is_wrong_is_not_used(caplog) -> None:
    def fails(*given: object) -> None:
        raise RuntimeError("no such card")

    def dense(q: Tensor, k: Tensor, v: Tensor, lists: KeyLists) -> tuple[Tensor, Tensor]:
        return plain_with_lse(q, k, v)

    def reads_behind_the_end(q: Tensor, k: Tensor, v: Tensor, lists: KeyLists) -> tuple[Tensor, Tensor]:
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % lists.key_size)) for x in (k, v))
        return plain_listed(q, k, v, lists)

    wrong = tuple(ListedBackend(one.__name__, one) for one in (fails, dense, reads_behind_the_end))
    where = torch.device("cpu"), torch.float32, 16, 16
    right = ListedBackend("right", plain_listed)
    assert choose_listed(*where, (*wrong, right)) is right
    warnings = [record.args[0] for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [one.name for one in wrong]
    with pytest.raises(ConfigError, match="wrong result"):
        choose_listed(*where, wrong)
    assert choose_listed(*where).name == "plain"
