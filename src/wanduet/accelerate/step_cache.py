"""Step caches: a denoise without the transformer in some of its steps, which reuse the last computed velocities.

All rules reuse velocities as EasyCache does. (MagCache and TeaCache, as published, reuse the residual of the tokens
inside the transformer: 100 MB a prompt at 480p, instead of 8 MB for a velocity. Their rules are the published ones, and
their results differ from the published ones for that reason.) So a cache does not depend on where the weights are, how
the sequence is shared, or which kernels run.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from wanduet.accelerate.skipped_steps import EASYCACHE_FIRST, levels_of, magcache_run, teacache_skips
from wanduet.family.spec import ModelSpec
from wanduet.family.step_caches import StepCacheSetting, table_of
from wanduet.kernels.attention.call import Step
from wanduet.request import ResolvedRequest
from wanduet.sampling.predictor import Predictor
from wanduet.sampling.samplers import Schedule, State

Condition = TypeVar("Condition")


@dataclass(frozen=True, slots=True)
class Computed:
    """The last computed step: its latents `[B, 16, T, h, w]` float32, and the velocity of each prompt, of that shape."""

    latents: Tensor
    velocities: list[Tensor]


class Rule(Protocol):
    """Decides which steps are skipped, by the latents and by the last computed step (None before the first)."""

    def skips(self, step: int, latents: Tensor, last: Computed | None) -> bool:
        """Return whether to skip this step of the schedule. Called once a step."""

    def computed(self, new: Computed, last: Computed | None) -> None:
        """Note that a step was computed; `last` is the computed step before it."""

    def state(self) -> State:
        """See Predictor."""

    def restore(self, state: State) -> None:
        """See Predictor. The state may have other entries."""


class StepCache(Generic[Condition]):
    """Predictor that computes some steps with `predictor`, and skips the others.

    In a skipped step, each prompt's velocity is `x + (v_last - x_last)`: of the latents x, and of velocity and latents at
    the last computed step. Source: EasyCache, arXiv 2507.02860.
    """

    def __init__(
        self, predictor: Predictor[Condition], rule: Rule, agree: Callable[[bool], bool], device: torch.device
    ) -> None:
        """`agree` makes all ranks of a group decide alike: it returns the first rank's decision. `device`: the
        latents'."""
        self._predictor, self._rule, self._agree, self._device = predictor, rule, agree, device
        self._last: Computed | None = None
        self.skipped: list[int] = []  # indices in the schedule

    def __call__(self, latents: Tensor, step: Step, conditions: Sequence[Condition]) -> Sequence[Tensor]:
        """See Predictor. The first condition is the prompt, by which a rule decides for all."""
        last = self._last
        skip = self._rule.skips(step.index, latents, last)
        if self._agree(skip) and last is not None and len(conditions) <= len(last.velocities):
            self.skipped.append(step.index)
            return [latents + (velocity - last.latents) for velocity in last.velocities[: len(conditions)]]
        self._last = Computed(latents, list(self._predictor(latents, step, conditions)))
        self._rule.computed(self._last, last)
        return self._last.velocities

    def state(self) -> State:
        """See Predictor."""
        if self._last is None:
            return {}
        last = {"latents": self._last.latents, "velocities": self._last.velocities}
        return self._predictor.state() | last | {"skipped": list(self.skipped)} | self._rule.state()

    def restore(self, state: State) -> None:
        """See Predictor."""
        state = {name: _moved(value, self._device) for name, value in state.items()}
        self._last = Computed(state["latents"], state["velocities"]) if "latents" in state else None
        self.skipped = state.get("skipped", [])
        self._predictor.restore(state)
        self._rule.restore(state)


class Stateless:
    """State of a predictor or a rule that has none."""

    def state(self) -> State:
        """Return {}."""
        return {}

    def restore(self, state: State) -> None:
        """Do nothing."""


class KnownSteps(Stateless):
    """Rule that skips steps which are known before the run (MagCache, TeaCache)."""

    def __init__(self, steps: Collection[int]) -> None:
        self._steps = frozenset(steps)

    def skips(self, step: int, latents: Tensor, last: Computed | None) -> bool:
        """See Rule."""
        return step in self._steps

    def computed(self, new: Computed, last: Computed | None) -> None:
        """See Rule."""


class EasyCache:
    """Rule that skips steps while the predicted relative change of the prompt's velocity, summed up since the last
    computed step, stays below a threshold. The first 10 steps of the run and its last are never skipped.

    The change is predicted from that of the latents: between the last two computed steps, the velocity changed `rate`
    times as much as they. Source: arXiv 2507.02860, H-EmbodVis/EasyCache (Apache-2.0). Waits for the device once a step.
    """

    def __init__(self, threshold: float, first_step: int, num_steps: int) -> None:
        """`num_steps`: of the schedule, of which a run makes those from `first_step` on."""
        self._threshold = threshold
        self._may_skip = range(first_step + EASYCACHE_FIRST, num_steps - 1)
        self._before: Tensor | None = None  # the latents of the step before
        self._rate: Tensor | None = None
        self._error = 0.0

    def skips(self, step: int, latents: Tensor, last: Computed | None) -> bool:
        """See Rule."""
        before, self._before = self._before, latents
        if step not in self._may_skip or before is None or self._rate is None or last is None:
            return False
        self._error += float(self._rate * _distance(latents, before) / last.velocities[0].abs().mean())
        return self._error < self._threshold

    def computed(self, new: Computed, last: Computed | None) -> None:
        """See Rule."""
        self._error = 0.0
        if last is not None:
            moved = _distance(new.latents, last.latents).clamp_min(torch.finfo(torch.float32).tiny)
            self._rate = _distance(new.velocities[0], last.velocities[0]) / moved

    def state(self) -> State:
        """See Rule."""
        return {"before": self._before, "rate": self._rate, "error": self._error}

    def restore(self, state: State) -> None:
        """See Rule."""
        self._before, self._rate, self._error = state.get("before"), state.get("rate"), state.get("error", 0.0)


def make_rule(request: ResolvedRequest, spec: ModelSpec, embed_time: Callable[[Tensor], Tensor]) -> Rule | None:
    """Return the rule that a request names; None for "off".

    `embed_time`: the transformer's, from timesteps `[steps]` to `[steps, C]`, both float32 on the host.
    """
    setting = StepCacheSetting.parse(request.step_cache, spec.transformer)
    if setting is None:
        return None
    first, total = request.first_step, request.num_inference_steps
    sigmas, timesteps = levels_of(Schedule.of(request))
    run = Run(sigmas[first:total], timesteps[first:total], first)
    return rule_of(setting, spec, run, embed_time)


@dataclass(frozen=True, slots=True)
class Run:
    """The steps that a denoise makes: noise levels (0..1) before them, their timesteps (0..1000), the first one's
    index."""

    sigmas: Sequence[float]
    timesteps: Sequence[float]
    first: int = 0


def rule_of(setting: StepCacheSetting, spec: ModelSpec, run: Run, embed_time: Callable[[Tensor], Tensor]) -> Rule:
    """Return the rule of a step cache for a run. `embed_time`: see `make_rule`."""
    if setting.name == "easycache":
        return EasyCache(setting.threshold, run.first, run.first + len(run.timesteps))
    table = table_of(spec.transformer)
    assert table is not None
    if setting.name == "magcache":
        skips = magcache_run(table, setting.threshold, run.sigmas)
    else:
        embeddings = embed_time(torch.tensor(run.timesteps, dtype=torch.float32))
        skips = teacache_skips(embeddings, table.coefficients, setting.threshold)
    return KnownSteps([run.first + index for index, skip in enumerate(skips) if skip])


def kept_latents(request: ResolvedRequest) -> int:
    """Return how many tensors of the latents' size a request keeps from step to step. A step cache: latents and one velocity
    a prompt; with EasyCache also the latents of the step before. APG: the sum of its differences."""
    of_guidance = int(request.guidance_mode == "apg")
    if request.step_cache == "off":
        return of_guidance
    return of_guidance + 2 + request.uses_guidance + request.step_cache.startswith("easycache")


def _distance(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs().mean()


def _moved(value: Any, device: torch.device) -> Any:
    """Return a part of a state with its tensors on a device."""
    if isinstance(value, list):
        return [_moved(item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value
