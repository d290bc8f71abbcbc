"""Measures the speed of each rank of a group, so that slower ranks get less work."""

import logging
import statistics
import time

import torch
from torch import Tensor

from wanduet.distributed.collectives import all_gather
from wanduet.distributed.mesh import Layout, Mesh, choose_layout, one_sequence
from wanduet.distributed.rank import Rank
from wanduet.family.sparsity import ALL
from wanduet.family.spec import ModelSpec
from wanduet.footprint.dit import buffer_bytes
from wanduet.footprint.phases import DTYPE_BYTES
from wanduet.planning.cost import step_seconds
from wanduet.planning.placement import pairs_up, sequence_cost
from wanduet.planning.plan import Plan
from wanduet.request import ResolvedRequest

log = logging.getLogger(__name__)

# Relative differences below this are measurement noise: ranks then get equal parts, which all exchanges support
# exactly.
ALIKE = 0.1
# Larger differences are measured up to this many times in all, and each rank's best result counts: a short disturbance
# on one device must not slow down the group for its whole life.
TRIES = 3
SIDE_GPU, SIDE_CPU = 4096, 512
PRODUCTS, GPU_S = 32, 0.4  # matrix products per timing; seconds of load, long enough for a GPU to reach its power limit
CPU_RUNS = 8
LINK_BYTES, LINK_RUNS = 32 * 2**20, 4  # of a timed exchange, about as large as that of one attention; and exchanges


def all_speeds(rank: Rank, given: tuple[float, ...] | None) -> tuple[float, ...]:
    """Return the relative speed of every rank, the same on all ranks: `given`, or measured with matrix products.

    All ranks must call this together; they measure at the same time. The fastest rank has 1; similar ranks all have 1, and
    so do CPUs, which share the host's cores: what each of them gets at a moment says nothing of the next.
    """
    if given is not None:
        return balanced(given)
    if rank.device.type == "cpu" and rank.link == "direct":  # no rank has a GPU
        return (1.0,) * rank.world_size
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
    """Return the speeds relative to the fastest; all 1 if no difference is larger than ALIKE."""
    fastest = max(speeds)
    relative = tuple(speed / fastest for speed in speeds)
    return relative if min(relative) < 1 - ALIKE else (1.0,) * len(speeds)


def suited_layout(
    plan: Plan, request: ResolvedRequest, spec: ModelSpec, speeds: tuple[float, ...], link_rate: float | None
) -> Layout:
    """Return the layout for the measured speeds: the planned one, which assumes only the devices' models, or one
    sequence split by speed.

    The latter is used instead of CFG parallelism if the faster half of the ranks would wait longer for the other half's
    guidance branch than for the exchanges of a split sequence (`link_rate`, of all ranks), and the exchange buffers fit in
    memory.
    """
    if plan.group.layout.cfg == 1:
        return plan.group.layout
    step_s, item = step_seconds(request, plan.prediction.seconds), DTYPE_BYTES[plan.transformer.dtype]
    if pairs_up(speeds, sequence_cost(request, spec, plan.group.layout.world_size, item, step_s, link_rate)):
        return plan.group.layout
    layout = choose_layout(plan.group.layout.world_size, spec.transformer.num_attention_heads, uses_guidance=False)
    if not _has_all_keys(layout, request, spec):
        return plan.group.layout
    shape = spec.latent_shape(request.generated_height, request.generated_width, request.num_frames)
    # The plan has not counted the exchange buffers. Apart from them, a part of the sequence for both branches needs no
    # more memory than one branch on the whole sequence.
    exchanged = buffer_bytes(spec.transformer, shape, plan.transformer.dtype, layout)
    fits = all(device.peak + exchanged <= device.limit_bytes for device in plan.prediction.devices)
    return layout if fits else plan.group.layout


def layout_unguided(
    plan: Plan, request: ResolvedRequest, spec: ModelSpec, layout: Layout, link_rate: float | None
) -> Layout | None:
    """Return the layout of the steps without guidance, of a request that has others, in which all ranks share the sequence of the prompt.

    None if these steps need no other one than `layout`, that of the guided steps, if exchanges would take longer than each
    rank needs for the whole sequence, or if the ranks would each have a part of the keys of sparse attention.
    """
    if layout.cfg == 1 or not request.ends_guidance:
        return None
    step_s, item = step_seconds(request, plan.prediction.seconds), DTYPE_BYTES[plan.transformer.dtype]
    # With both prompts, exchanges add `cost - 1` to the time in which a rank computes one of them whole. With one prompt
    # they add half of it, and computing takes half the time.
    cost = sequence_cost(request, spec, layout.world_size, item, step_s, link_rate)
    after = one_sequence(layout, spec.transformer.num_attention_heads)
    return after if cost < 2 and _has_all_keys(after, request, spec) else None


def _has_all_keys(layout: Layout, request: ResolvedRequest, spec: ModelSpec) -> bool:
    """Return whether the ranks of a layout can run the request's attention: a sparse one needs all keys at once, of
    which each rank of a ring has a part."""
    return layout.ring == 1 or (request.sparse == ALL and spec.transformer.attention == "dense")


def of_sequence(speeds: tuple[float, ...], mesh: Mesh) -> tuple[float, ...]:
    """Return the speeds of the ranks that share this rank's sequence, in rank order."""
    degree = mesh.layout.sequence
    start = mesh.cfg_rank * degree
    return speeds[start : start + degree]


def link_rate(rank: Rank) -> float | None:
    """Return the bytes a second that each rank sends by collectives, measured, the same on all ranks; None where they write
    to each other's memory. All ranks must call this together."""
    if rank.link == "direct":
        return None
    sent, best = torch.zeros(LINK_BYTES, dtype=torch.uint8, device=rank.device), float("inf")
    for _ in range(LINK_RUNS):  # the first also sets up connections
        began = time.perf_counter()
        all_gather(sent)
        if rank.device.type == "cuda":
            torch.cuda.synchronize(rank.device)
        best = min(best, time.perf_counter() - began)
    own = torch.tensor([LINK_BYTES * (rank.world_size - 1) / best], dtype=torch.float64, device=rank.device)
    rate = min(map(float, all_gather(own)))
    log.info("Ranks send %.1f GB/s each.", rate / 1e9)
    return rate


def _measure(device: torch.device) -> float:
    """Return matrix products per second: of a GPU under load, by CUDA events; of a CPU, the best of several runs."""
    if device.type == "cuda":
        # Random values: products of ones take less power, and GPUs differ most at their power limit.
        a = torch.randn(SIDE_GPU, SIDE_GPU, device=device, dtype=torch.bfloat16)
        seconds, until = [], time.perf_counter() + GPU_S
        while time.perf_counter() < until:
            seconds.append(_on_gpu(a))
        return 1.0 / statistics.median(seconds[len(seconds) // 2 :])
    a = torch.ones(SIDE_CPU, SIDE_CPU)
    return 1.0 / min(_on_cpu(a) for _ in range(CPU_RUNS))


def _on_gpu(a: Tensor) -> float:
    """Return the mean seconds of one product over PRODUCTS products."""
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
