"""The step caches that a request may name, and their constants for the members of the family. Does not import torch.

A step cache skips the transformer in some of a denoise's steps (`accelerate.step_cache`). Which steps those are is
decided by one of three rules; MagCache and TeaCache need constants of the model, EasyCache does not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from wanduet.errors import InvalidRequestError
from wanduet.family.spec import ModelSpec, TransformerSpec

OFF = "off"
# The fewest steps of a run with each rule. EasyCache computes the first 10 and the last; below 8 steps, each step is too
# long for the step before to stand for it.
FEWEST_STEPS = {"easycache": 12, "magcache": 8, "teacache": 8}
NAMES = tuple(FEWEST_STEPS)
EASYCACHE_THRESHOLD, MAGCACHE_THRESHOLD = 0.05, 0.12
ALLOWED = f"one of {', '.join((OFF, *NAMES))}; a threshold may follow the last three, as in easycache:0.05"


@dataclass(frozen=True, slots=True)
class StepCacheTable:
    """The constants of one transformer.

    `ratios`: for each of 50 steps with `flow_shift`, how large the residual of the tokens is beside that of the step
    before (MagCache; of the prompt's branch). Source: arXiv 2506.09045, Zehong-Ma/MagCache (Apache-2.0). Their 50 steps
    are those of sampler "unipc-official"; the shift of the 14B model's is assumed to be the official default.

    `coefficients`: of the polynomial, highest degree first, from the relative change of the time embedding to that of
    the model's output (TeaCache, without retention steps). Source: arXiv 2411.19108, ali-vilab/TeaCache (Apache-2.0).
    `threshold`: TeaCache's default, from the same. `shares`: by threshold, the share of the forwards that they compute,
    worked out from the seconds that they publish.
    """

    flow_shift: float
    ratios: tuple[float, ...]
    coefficients: tuple[float, ...]
    threshold: float
    shares: tuple[tuple[float, float], ...]


# By the number of blocks and their width.
TABLES: Mapping[tuple[int, int], StepCacheTable] = {
    (30, 1536): StepCacheTable(
        8.0,
        (
            1.0, 1.0124, 1.00166, 0.99791, 0.99682, 0.99634, 0.99567, 0.99416, 0.99578, 0.9957,
            0.99511, 0.99535, 0.99552, 0.99541, 0.9954, 0.99489, 0.99518, 0.99484, 0.99481, 0.99415,
            0.99419, 0.99396, 0.99388, 0.99349, 0.99309, 0.9927, 0.99228, 0.99171, 0.99137, 0.99068,
            0.99005, 0.98944, 0.98849, 0.98758, 0.98644, 0.98504, 0.9836, 0.98202, 0.97977, 0.97717,
            0.9741, 0.97003, 0.96538, 0.9593, 0.95086, 0.94013, 0.92402, 0.90241, 0.86821, 0.81838,
        ),
        (2.39676752e3, -1.31110545e3, 2.01331979e2, -8.29855975, 1.37887774e-1),
        0.08,
        ((0.0, 1.0), (0.05, 0.67), (0.07, 0.63), (0.08, 0.5)),
    ),
    (40, 5120): StepCacheTable(
        5.0,
        (
            1.0, 1.02504, 1.00025, 0.9985, 0.99779, 0.9966, 0.99482, 0.99467, 0.99664, 0.99434,
            0.99533, 0.99468, 0.99438, 0.99516, 0.99384, 0.99404, 0.99517, 0.99409, 0.99428, 0.99347,
            0.99418, 0.99271, 0.99313, 0.99215, 0.99218, 0.99216, 0.99163, 0.99138, 0.98982, 0.98996,
            0.9887, 0.98772, 0.98767, 0.98573, 0.98501, 0.9838, 0.98177, 0.98037, 0.97678, 0.97546,
            0.97184, 0.96711, 0.96349, 0.95629, 0.94926, 0.93964, 0.92511, 0.90693, 0.8796, 0.86111,
        ),
        (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
        0.14,
        ((0.0, 1.0), (0.14, 0.67), (0.2, 0.5)),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StepCacheSetting:
    """A step cache as a request names it: the rule, and its threshold, above 0 and at most 1. The higher the threshold,
    the more steps are skipped."""

    name: str
    threshold: float

    @classmethod
    def parse(cls, text: str, spec: TransformerSpec) -> Self | None:
        """Parse `NAME` or `NAME:THRESHOLD`, for a transformer of this shape; None for "off".

        Raises InvalidRequestError for another form, and for a rule that needs constants that this model has not.
        """
        name, separator, number = text.strip().lower().partition(":")
        if name == OFF and not separator:
            return None
        if name not in NAMES:
            from difflib import get_close_matches

            close = get_close_matches(name, (OFF, *NAMES), 1)
            raise InvalidRequestError("step_cache", text, ALLOWED, close[0] if close else None)
        table = table_of(spec)
        if name != "easycache" and table is None:
            allowed = f"easycache for this model: {name} needs constants that are known for Wan2.1 1.3B and 14B only"
            raise InvalidRequestError("step_cache", text, allowed, "easycache")
        teacache = MAGCACHE_THRESHOLD if table is None else table.threshold
        usual = {"easycache": EASYCACHE_THRESHOLD, "magcache": MAGCACHE_THRESHOLD, "teacache": teacache}[name]
        return cls(name, _threshold(text, cls(name, usual), number) if separator else usual)

    def __str__(self) -> str:
        """The form that `parse` reads, with the threshold."""
        return f"{self.name}:{self.threshold!r}"


def table_of(spec: TransformerSpec) -> StepCacheTable | None:
    """Return the constants of a transformer by its shape, which its fine-tuned forms share; None for other models."""
    return TABLES.get((spec.num_layers, spec.dim))


def check_steps(setting: StepCacheSetting, steps: int, sampler: str, spec: ModelSpec) -> None:
    """Raise InvalidRequestError if a run has too few steps for a step cache, or steps that it cannot skip, and for weights
    that are distilled for few steps, however many are run."""
    if spec.defaults.of_distilled_weights and sampler != "renoise" and steps >= FEWEST_STEPS[setting.name]:
        allowed = f"{OFF} with {spec.name}, whose weights are distilled for {len(spec.defaults.timesteps)} steps"
        raise InvalidRequestError("step_cache", str(setting), allowed, OFF)
    if sampler == "renoise":
        allowed = f"{OFF} with the sampler renoise, whose steps each begin from new noise"
        raise InvalidRequestError("step_cache", str(setting), allowed, OFF)
    fewest = FEWEST_STEPS[setting.name]
    if steps < fewest:
        allowed = f"{OFF} for fewer than {fewest} steps, as too little would be computed; this run has {steps}"
        raise InvalidRequestError("step_cache", str(setting), allowed, OFF)


def _threshold(text: str, usual: StepCacheSetting, number: str) -> float:
    try:
        threshold = float(number)
    except ValueError:
        raise InvalidRequestError("step_cache", text, ALLOWED, usual.name) from None
    if not 0 < threshold <= 1:  # NaN, too
        nearest = StepCacheSetting(usual.name, 1.0) if threshold > 1 else usual
        raise InvalidRequestError("step_cache", text, "a threshold above 0 and at most 1", str(nearest))
    return threshold
