"""Two GPUs that write to each other's memory. Run with `pytest -m gpu`."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from wanduet.distributed.launch import run_on_ranks
from wanduet.distributed.mesh import Layout
from wanduet.distributed.p2p.copies import GpuPeerMemory
from wanduet.distributed.rank import Rank
from wanduet.distributed.sequence.hybrid import SequenceSharding
from wanduet.kernels.attention.backends import sdpa
from wanduet.kernels.attention.call import AttentionCall

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
HEADS, CHANNELS, BLOCKS = 12, 128, 8
# Tokens and the ranks' speeds: even parts, odd ones, unequal ones, a buffer that grows, and one that is large enough.
CASES = [(2048, (1.0, 1.0)), (5001, (1.0, 1.0)), (5001, (1.0, 0.3)), (9000, (0.7, 1.0)), (600, (1.0, 1.0))]


def send_qkv(way: SequenceSharding, index: int, x: Tensor) -> Tensor:
    """Send `x` from the buffer that it should be computed in, and return it there."""
    buffer = way.qkv_buffer(index, x.flatten(2))
    if buffer is not None:
        x = buffer.copy_(x.flatten(2)).unflatten(2, x.shape[2:])
    way.send_qkv(index, x)
    return x


@torch.no_grad()
def attend_all_ways(rank: Rank) -> tuple[bool, list[tuple[bool, float]]]:
    """Return whether memory is shared, and for each case: are all ways equal on all blocks, the last block's error."""
    mesh, other = (rank.mesh(Layout(ulysses=rank.world_size)) for _ in range(2))
    torch.manual_seed(0)
    results_by_case = []
    for tokens, shares in CASES:
        ways = [
            SequenceSharding(mesh, shares=shares),
            SequenceSharding(other, shares=shares, always_ulysses=True),
            SequenceSharding(replace(mesh, peer_memory=None), shares=shares),
        ]
        wholes = torch.randn(BLOCKS, 1, tokens, 3 * HEADS * CHANNELS, device=rank.device, dtype=torch.bfloat16)
        equal, error = True, 0.0
        for whole in wholes:
            results: list[Tensor] = []
            for way in ways:
                q, k, v = (
                    x.unflatten(-1, (HEADS, CHANNELS)) for x in way.shard_sequence(whole, 1).clone().chunk(3, dim=-1)
                )
                if way.overlaps_projections:
                    v, k, q = (send_qkv(way, index, x) for index, x in ((2, v), (1, k), (0, q)))
                results.append(way.attend(q, k, v, sdpa, AttentionCall((1, 1, q.shape[1]))).clone())
                way.gather_sequence(results[-1], 1)
            equal &= all(torch.equal(result, results[0]) for result in results)
            q, k, v = (x.unflatten(-1, (HEADS, CHANNELS)) for x in whole.float().chunk(3, dim=-1))
            expected = ways[0].shard_sequence(sdpa(q, k, v), 1)
            error = float((results[0] - expected).norm() / expected.norm())
        results_by_case.append((equal, error))
    return isinstance(mesh.peer_memory, GpuPeerMemory), results_by_case


def shares_memory_without(lost: str, rank: Rank) -> bool:
    """Return whether ranks share memory if the method `lost` of their peer memory does nothing."""

    def nothing(*_: object) -> None:
        pass

    setattr(GpuPeerMemory, lost, nothing)
    return rank.mesh(Layout(ulysses=rank.world_size)).peer_memory is not None


@pytest.mark.parametrize("lost", ["copy", "signal"])
def test_gpus_that_lose_what_they_send_exchange_by_collectives(lost: str) -> None:
    assert run_on_ranks(partial(shares_memory_without, lost), ("cuda:0", "cuda:1")) == [False, False]


def test_copies_give_what_collectives_give() -> None:
    for shared, results_by_case in run_on_ranks(attend_all_ways, ("cuda:0", "cuda:1")):
        assert shared
        assert all(equal for equal, _ in results_by_case), results_by_case
        assert all(error < 1e-2 for _, error in results_by_case), results_by_case
