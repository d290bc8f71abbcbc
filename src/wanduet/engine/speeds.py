"""How fast each rank of a group is, so that the slower one gets less to do."""

import logging
import statistics
import time

import torch
from torch import Tensor

from wanduet.distributed.collectives import all_gather
from wanduet.distributed.links import Link
from wanduet.distributed.mesh import Layout, Mesh, choose_layout
from wanduet.distributed.rank import Rank
from wanduet.family.specs import ModelSpec
from wanduet.footprint.dit import buffer_bytes
from wanduet.footprint.phases import DTYPE_BYTES
from wanduet.planning.cost import step_seconds
from wanduet.planning.placement import pairs_up, sequence_cost
from wanduet.planning.plan import Plan
from wanduet.request import ResolvedRequest

log = logging.getLogger(__name__)

# Speeds that differ by less than this are noise: equal parts are exact in every exchange.
ALIKE = 0.1
# Where they differ by more, they are measured again, so often in all, and what a rank did best counts: what else ran
# on a device for a moment must not slow a group down for as long as it lives.
TRIES = 3
SIDE_GPU, SIDE_CPU = 4096, 512
PRODUCTS, GPU_S = 32, 0.4  # between two looks at a GPU's clock; so long that it comes to its power limit
CPU_RUNS = 8


def all_speeds(rank: Rank, given: tuple[float, ...] | None) -> tuple[float, ...]:
    """Relative speed of every rank, the same answer on each: given, or measured by matrix products, by all at once.

    All ranks must call this together. Fastest is 1; ranks that are alike all get 1.
    """
    if given is not None:
        return balanced(given)
    best = [0.0] * rank.world_size
    for _ in range(TRIES):
        own = torch.tensor([_measure(rank.device)], dtype=torch.float64, device=rank.device)
        best = [max(pair) for pair in zip(best, map(float, all_gather(own)), strict=True)]
        speeds = balanced(tuple(best))
        if len(set(speeds)) == 1:
            break
    log.info("Speeds of the ranks: %s, taken for %s.", best, speeds)
    return speeds


def balanced(speeds: tuple[float, ...]) -> tuple[float, ...]:
    """Speeds relative to the fastest; all 1 where they are alike."""
    fastest = max(speeds)
    relative = tuple(speed / fastest for speed in speeds)
    return relative if min(relative) < 1 - ALIKE else (1.0,) * len(speeds)


def suited_layout(
    plan: Plan, request: ResolvedRequest, spec: ModelSpec, speeds: tuple[float, ...], link: Link
) -> Layout:
    """What was planned, from no more than the devices' kinds; but one sequence, cut by speed, where the faster half
    would wait longer for the other's branch of the guidance than for what is exchanged over the ranks' `link`, and there
    is room for that."""
    if plan.group.layout.cfg == 1:
        return plan.group.layout
    step_s, item = step_seconds(request, plan.prediction.seconds), DTYPE_BYTES[plan.transformer.dtype]
    if pairs_up(speeds, sequence_cost(request, spec, plan.group.layout.world_size, item, step_s, link)):
        return plan.group.layout
    layout = choose_layout(plan.group.layout.world_size, spec.transformer.num_attention_heads, uses_guidance=False)
    shape = spec.latent_shape(request.generated_height, request.generated_width, request.num_frames)
    # Which the plan has not counted; else a part of the sequence needs no more than a branch on the whole of it.
    exchanged = buffer_bytes(spec.transformer, shape, plan.transformer.dtype, layout)
    fits = all(device.peak + exchanged <= device.limit_bytes for device in plan.prediction.devices)
    return layout if fits else plan.group.layout


def of_sequence(speeds: tuple[float, ...], mesh: Mesh) -> tuple[float, ...]:
    """The speeds of the ranks that share this rank's sequence, in their order."""
    degree = mesh.layout.sequence
    start = mesh.cfg_rank * degree
    return speeds[start : start + degree]


def _measure(device: torch.device) -> float:
    """Matrix products a second: of a GPU under load, by its own clock; of a CPU the best of a few."""
    if device.type == "cuda":
        # Of random numbers: those of ones take less power, and cards differ most in what their power limit leaves.
        a = torch.randn(SIDE_GPU, SIDE_GPU, device=device, dtype=torch.bfloat16)
        seconds, until = [], time.perf_counter() + GPU_S
        while time.perf_counter() < until:
            seconds.append(_on_gpu(a))
        return 1.0 / statistics.median(seconds[len(seconds) // 2 :])
    a = torch.ones(SIDE_CPU, SIDE_CPU)
    return 1.0 / min(_on_cpu(a) for _ in range(CPU_RUNS))


def _on_gpu(a: Tensor) -> float:
    """Seconds of one product, the mean of several."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(PRODUCTS):
        a @ a
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3 / PRODUCTS


def _on_cpu(a: Tensor) -> float:
    began = time.perf_counter()
    a @ a
    return time.perf_counter() - began
