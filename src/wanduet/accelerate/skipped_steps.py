"""Which steps of a denoise a step cache skips, as far as that is known before it runs.

MagCache's steps follow from the noise levels, TeaCache's from the time embeddings of the model, so both are the same for
every prompt. EasyCache decides by the latents; there is only an estimate of how many steps it computes.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Self

import torch

from wanduet.family.spec import ModelSpec
from wanduet.family.step_caches import StepCacheSetting, StepCacheTable, table_of
from wanduet.request import ResolvedRequest
from wanduet.sampling.samplers import Schedule, make_sampler, official_sigmas

# MagCache leaves this share of the run's steps, its first, as they are. The paper's.
RETENTION_SHARE = 0.2
# By threshold, the share that EasyCache computes of the steps in which it may skip: at 0.05 from the published speed-up
# of 2.54 (arXiv 2507.02860), else as measured on the miniature (benchmarks/results/step_caches_miniature.json).
EASYCACHE_SHARES = ((0.0, 1.0), (0.02, 0.44), (0.05, 0.22), (0.1, 0.13), (0.2, 0.065))
EASYCACHE_FIRST = 10  # steps of a run that EasyCache always computes, beside the last


@dataclass(frozen=True, slots=True)
class Forwards:
    """The transformer's forwards of one video, by the kind of step: with guidance (two forwards) and without.

    `is_estimate`: the true number is known only after the run.
    """

    guided_steps: float
    plain_steps: float
    exact_count: int  # without approximations
    is_estimate: bool = False

    @property
    def count(self) -> int:
        """All forwards."""
        return round(2 * self.guided_steps + self.plain_steps)

    def as_dict(self) -> dict[str, int | bool]:
        """Return them as `wanduet plan --json` prints them: `count` of the exact `of`."""
        return {"count": self.count, "of": self.exact_count, "is_estimate": self.is_estimate}

    @classmethod
    def of(cls, request: ResolvedRequest, spec: ModelSpec) -> Self:
        """Predict the forwards of a video of this request."""
        first, guided, zero = request.first_step, request.guided_steps, request.num_zero_steps
        run = range(first + zero, request.num_inference_steps)  # CFG-Zero* leaves out steps of an exact video, too
        exact = len(run) * (1 + request.uses_guidance)
        setting = StepCacheSetting.parse(request.step_cache, spec.transformer)
        if setting is None:
            return cls(len(guided), len(run) - len(guided), exact)
        if setting.name == "magcache":
            skipped = magcache_steps(request, spec)
            computed = [step for step in run if step not in skipped]
            of_guided = sum(step in guided for step in computed)
            return cls(of_guided, len(computed) - of_guided, exact)
        always = EASYCACHE_FIRST if setting.name == "easycache" else 1
        share = _interpolated(_shares(setting, spec), setting.threshold)

        def before(step: int) -> float:
            if step == run.stop:
                return before(step - 1) + 1  # the last is always computed
            return min(step - first, always) + share * max(0, step - first - always)

        estimate = before(guided.stop) - before(guided.start) if guided else 0.0
        total = before(run.stop) - before(run.start)
        return cls(estimate, total - estimate, exact, is_estimate=True)


def forwards_made(request: ResolvedRequest, skipped: Sequence[int]) -> int:
    """Return the forwards that made a video whose steps `skipped` (indices in the schedule) were skipped."""
    first = request.first_step
    computed = set(range(first + request.num_zero_steps, request.num_inference_steps)) - set(skipped)
    return len(computed) + len(computed.intersection(request.guided_steps))


def magcache_steps(request: ResolvedRequest, spec: ModelSpec) -> frozenset[int]:
    """Return the steps of the schedule that MagCache skips. The request's `step_cache` must name it."""
    setting, table = StepCacheSetting.parse(request.step_cache, spec.transformer), table_of(spec.transformer)
    assert setting is not None
    assert table is not None
    first = request.first_step
    sigmas, _ = levels_of(Schedule.of(request))
    skips = magcache_run(table, setting.threshold, sigmas[first : request.num_inference_steps])
    # At the begin of a guidance interval, there is no velocity of the negative prompt yet.
    never = request.guided_steps[:1]
    return frozenset(first + index for index, skip in enumerate(skips) if skip and first + index not in never)


def magcache_run(table: StepCacheTable, threshold: float, sigmas: Sequence[float]) -> list[bool]:
    """Return for each step of a run, whose noise levels before its steps are `sigmas`, whether MagCache skips it."""
    # The pairs that the paper recommends.
    most = 2 if threshold <= 0.12 else 4 if threshold < 0.24 else 6
    skips = magcache_skips(ratios_at(table, sigmas), threshold, most, int(RETENTION_SHARE * len(sigmas)))
    skips[-1] = False  # no later step would remove the error
    return skips


def magcache_skips(ratios: Sequence[float], threshold: float, most: int, first: int) -> list[bool]:
    """Return for each step whether MagCache skips it: at most `most` in a row, and none of the first `first`.

    `ratios`: see `StepCacheTable`. Source: arXiv 2506.09045.
    """
    skips, product, count, error = [False] * min(first, len(ratios)), 1.0, 0, 0.0
    for ratio in ratios[first:]:
        product, count = product * ratio, count + 1
        error += abs(1 - product)
        skips.append(error < threshold and count <= most)
        if not skips[-1]:
            product, count, error = 1.0, 0, 0.0
    return skips


def ratios_at(table: StepCacheTable, sigmas: Sequence[float]) -> list[float]:
    """Return MagCache's ratio for each step of a run, whose noise levels before its steps are `sigmas` (falling).

    A ratio belongs to a pair of noise levels, not to a step number: the logarithms of the table's ratios, summed up, are
    a function of the noise level, and a run with other steps reads the difference between two of its own.
    """
    levels = shifted(official_sigmas(len(table.ratios)).tolist(), table.flow_shift)
    sums = [sum(map(math.log, table.ratios[: index + 1])) for index in range(len(levels))]
    known = sorted(zip(levels, sums, strict=True))
    size = [_interpolated(known, sigma, beyond=True) for sigma in sigmas]
    return [1.0, *(math.exp(after - before) for before, after in pairwise(size))]


def teacache_skips(embeddings: torch.Tensor, coefficients: Sequence[float], threshold: float) -> list[bool]:
    """Return for each step whether TeaCache skips it; never the first and the last.

    `embeddings`: the time embeddings `[steps, C]` of a run. Source: arXiv 2411.19108, without retention steps.
    """
    x = embeddings.double()
    changes = ((x[1:] - x[:-1]).abs().mean(1) / x[:-1].abs().mean(1)).tolist()
    skips, total = [False], 0.0
    for change in changes:
        value = 0.0
        for coefficient in coefficients:
            value = value * change + coefficient
        total += value
        skips.append(total < threshold)
        if not skips[-1]:
            total = 0.0
    skips[-1] = False
    return skips


@lru_cache(maxsize=64)
def levels_of(schedule: Schedule) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return a schedule's noise levels, before each step and after the last, and its timesteps."""
    made = make_sampler(schedule, 0, torch.device("cpu"))
    return tuple(made.sigmas), tuple(made.timesteps)


def shifted(sigmas: Sequence[float], flow_shift: float) -> list[float]:
    """Return noise levels 0..1 moved by a flow shift."""
    return [flow_shift * sigma / (1 + (flow_shift - 1) * sigma) for sigma in sigmas]


def _shares(setting: StepCacheSetting, spec: ModelSpec) -> Sequence[tuple[float, float]]:
    if setting.name == "easycache":
        return EASYCACHE_SHARES
    table = table_of(spec.transformer)
    assert table is not None
    return table.shares


def _interpolated(points: Sequence[tuple[float, float]], x: float, beyond: bool = False) -> float:
    """Return the value at `x` on the straight lines between points of rising x; outside of them the nearest point's
    value, or with `beyond` a value on the nearest line, continued."""
    index = min(max(bisect_left(points, (x,)), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    share = (x - x0) / (x1 - x0)
    return y0 + (y1 - y0) * (share if beyond else min(max(share, 0.0), 1.0))
