"""How fast each rank of a group is, so that the slower one gets less to do."""

import time

import torch
from torch import Tensor

from wanduet.parallel.exchange import gather
from wanduet.parallel.mesh import Mesh
from wanduet.parallel.rank import Rank

# Speeds that differ by less than this are noise: equal parts are exact in every exchange.
ALIKE = 0.1
SIDE_GPU, SIDE_CPU, RUNS = 4096, 512, 8


def all_speeds(rank: Rank, mesh: Mesh, given: tuple[float, ...] | None) -> tuple[float, ...]:
    """Relative speed of every rank, the same answer on each: given, or measured by a matrix product.

    All ranks must call this together. Fastest is 1; ranks that are alike all get 1.
    """
    if given is not None:
        return balanced(given)
    own = torch.tensor([_measure(rank.device)], dtype=torch.float64, device=rank.device)
    group = torch.distributed.group.WORLD
    assert group is not None
    return balanced(tuple(float(speed) for speed in gather(own, group)))


def balanced(speeds: tuple[float, ...]) -> tuple[float, ...]:
    """Speeds relative to the fastest; all 1 where they are alike."""
    fastest = max(speeds)
    relative = tuple(speed / fastest for speed in speeds)
    return relative if min(relative) < 1 - ALIKE else (1.0,) * len(speeds)


def of_sequence(speeds: tuple[float, ...], mesh: Mesh) -> tuple[float, ...]:
    """The speeds of the ranks that share this rank's sequence, in their order."""
    degree = mesh.layout.sequence
    start = mesh.cfg_rank * degree
    return speeds[start : start + degree]


def _measure(device: torch.device) -> float:
    """Matrix products a second, the best of a few: what else runs on the device must not count."""
    on_gpu = device.type == "cuda"
    side, dtype = (SIDE_GPU, torch.bfloat16) if on_gpu else (SIDE_CPU, torch.float32)
    a = torch.ones(side, side, device=device, dtype=dtype)
    best = min(_seconds(a, on_gpu) for _ in range(RUNS))
    return 1.0 / best


def _seconds(a: Tensor, on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize(a.device)
    began = time.perf_counter()
    a @ a
    if on_gpu:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - began
