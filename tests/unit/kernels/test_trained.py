"""VSA and SLA on lists of key blocks: the plain kernel, and Triton's in its interpreter, against the formulas.

In the transformer: tests/unit/models/test_trained_sparse.py.
"""

import pytest
import torch
from torch import Tensor

from tests.trained_references import heads_first, reference_sla, reference_vsa
from wanduet.errors import ConfigError
from wanduet.kernels.attention.backends import sdpa
from wanduet.kernels.attention.call import AttentionCall
from wanduet.kernels.attention.sparse import ListedFn, plain_listed
from wanduet.kernels.attention.sparse_steps import ListedBackend, choose_listed
from wanduet.kernels.attention.trained import TrainedSparse
from wanduet.models.dit.token_order import tile_order

GRID = (2, 5, 6)  # 2 x 2 tiles, all of them cut
CALL = AttentionCall(GRID)


@pytest.fixture(params=["plain", "triton"])
def listed(request) -> ListedFn:
    if request.param == "plain":
        return plain_listed
    kernel: ListedFn = request.getfixturevalue("interpreted")("wanduet.kernels.attention.sparse_gpu").attend_listed
    return kernel


def random(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn(shape) for shape in shapes]


def assert_is(out: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(out, expected.transpose(0, 1)[None].float(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_vsa_is_its_formula_with_tiles_of_true_token_counts(listed: ListedFn) -> None:
    q, k, v, gate = random(*[(1, 60, 2, 24)] * 4)
    order = tile_order(GRID)
    assert order.blocks.starts.tolist() == [0, 32, 48, 56, 60]
    qkv = q[:, order.tokens], k[:, order.tokens], v[:, order.tokens]
    fine, coarse = TrainedSparse(listed).vsa(qkv, order.blocks, 0.3, sdpa, CALL)
    out = fine + coarse.transpose(1, 2)[:, order.tiles] * gate[:, order.tokens]
    assert_is(out[:, order.positions], reference_vsa(*heads_first(q, k, v, gate), GRID, 0.3))


@torch.no_grad()
def test_sla_is_its_formula(listed: ListedFn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanduet.kernels.attention.trained.LINEAR_TOKENS", 64)
    q, k, v, weight, bias = random(*[(1, 150, 2, 24)] * 3, (24, 24), (24,))
    k += 2.0  # a mean that cancels
    out = TrainedSparse(listed).sla((q, k, v), (weight, bias), 0.7, sdpa, CALL)
    assert_is(out, reference_sla(*heads_first(q, k, v), weight.double(), bias.double(), 0.7))


def test_a_kernel_is_checked_with_blocks_as_it_gets_them() -> None:
    """Of different sizes for VSA, 128 queries and 64 keys for SLA."""
    seen = []

    def wrong(q, k, v, lists):
        seen.append(lists)
        out, lse = plain_listed(q, k, v, lists)
        return out * (1.5 if len(seen) < 3 else 1.0), lse

    backends = (ListedBackend("wrong", wrong),)
    for block in (None, (128, 64)):
        with pytest.raises(ConfigError, match="wrong result"):
            choose_listed(torch.device("cpu"), torch.float32, 24, block, backends)
    vsa, sla = seen
    assert len(set(vsa.key_blocks.starts.diff().tolist())) > 1
    assert (sla.query_size, sla.key_size, sla.key_blocks) == (128, 64, None)
    choose_listed.cache_clear()
    for block in (None, (128, 64)):
        assert choose_listed(torch.device("cpu"), torch.float32, 24, block, backends) is backends[0]
    choose_listed.cache_clear()
