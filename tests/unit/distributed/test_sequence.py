"""Errors of sequence sharding, with one gloo rank in this process, and the merge of partial attention."""

from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
from torch import distributed as dist

from wanduet.distributed.mesh import Layout, Mesh
from wanduet.distributed.sequence.hybrid import SequenceSharding
from wanduet.distributed.sequence.ring import _MergedAttention
from wanduet.distributed.sequence.ulysses import UlyssesAttention
from wanduet.errors import ConfigError
from wanduet.kernels.attention.backends import plain_with_lse, sdpa
from wanduet.kernels.attention.call import AttentionCall

CALL = AttentionCall((1, 1, 5))


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("ranks") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=20))
    yield Mesh.create(Layout(), 20.0)
    dist.destroy_process_group()


def qkv(length: int, heads: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, length, heads, 8) for _ in range(3)]


def test_one_rank_is_the_identity(mesh: Mesh) -> None:
    sharding, (q, k, v) = SequenceSharding(mesh), qkv(5)
    assert torch.equal(sharding.shard_sequence(q, 1), q)
    assert torch.equal(sharding.attend(q, k, v, sdpa, CALL), sdpa(q, k, v))
    assert torch.equal(sharding.gather_sequence(q, 1), q)


def test_a_part_of_another_sequence_is_refused(mesh: Mesh) -> None:
    sharding = SequenceSharding(mesh)
    with pytest.raises(ValueError, match="5 tokens"):
        sharding.attend(*qkv(5), sdpa, CALL)
    sharding.shard_sequence(torch.empty(1, 7, 2), 1)
    with pytest.raises(ValueError, match="5 tokens"):
        sharding.attend(*qkv(5), sdpa, CALL)
    with pytest.raises(ValueError, match="5 tokens"):
        sharding.gather_sequence(torch.empty(1, 5, 2), 1)


def test_gradients_are_refused(mesh: Mesh) -> None:
    sharding, (q, k, v) = SequenceSharding(mesh), qkv(5)
    sharding.shard_sequence(q, 1)
    with pytest.raises(RuntimeError, match="gradients"):
        sharding.attend(q.requires_grad_(), k, v, sdpa, CALL)


def test_what_does_not_fit_the_mesh_is_refused(mesh: Mesh) -> None:
    with pytest.raises(ConfigError, match="needs 2 ranks"):
        Mesh.create(Layout(ring=2), 20.0)
    with pytest.raises(ConfigError, match="shares"):
        SequenceSharding(mesh, shares=(1.0, 1.0))
    with pytest.raises(ConfigError, match="shares"):
        SequenceSharding(mesh, shares=(0.0,))
    with pytest.raises(ConfigError, match="3 heads"):
        UlyssesAttention(mesh.ulysses, (5, 5), 0).attend(*qkv(5, heads=3), sdpa, CALL, 1)


def test_a_ring_needs_the_log_sum_exp(mesh: Mesh) -> None:
    ring = Mesh(Layout(ring=2), mesh.cfg, mesh.sequence, mesh.ring, mesh.ulysses)
    with pytest.raises(ConfigError, match="log-sum-exp"):
        SequenceSharding(ring, attention_lse=None)


@pytest.mark.parametrize("cuts", [(1, 12), (5, 4, 4), (13,)])
def test_attention_to_parts_of_the_keys_merges_exactly(cuts: tuple[int, ...]) -> None:
    q, k, v = (3 * x for x in qkv(13))  # large scores: the weights of the parts differ much
    merged = _MergedAttention()
    for k_part, v_part in zip(k.split(cuts, 1), v.split(cuts, 1), strict=True):
        merged.add(*plain_with_lse(q, k_part, v_part))
    torch.testing.assert_close(merged.result(q), sdpa(q, k, v), rtol=1e-5, atol=1e-5)
