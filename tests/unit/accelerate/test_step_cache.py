"""Step caches: the rules against the published ones in a few lines, what is reused, and that a state goes on alike."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from wanduet.accelerate.skipped_steps import (
    Forwards,
    magcache_skips,
    magcache_steps,
    ratios_at,
    shifted,
    teacache_skips,
)
from wanduet.accelerate.step_cache import EasyCache, KnownSteps, Rule, StepCache, kept_latents, make_rule
from wanduet.errors import InvalidRequestError
from wanduet.family.spec import ModelSpec
from wanduet.family.step_caches import StepCacheSetting, table_of
from wanduet.family.wan21 import WAN_1_3B, WAN_14B
from wanduet.kernels.attention.call import Step
from wanduet.request import GenerationRequest, ResolvedRequest
from wanduet.sampling.samplers import Schedule, make_sampler, official_sigmas

CPU = torch.device("cpu")
SMALL = replace(WAN_1_3B, name="small", transformer=replace(WAN_1_3B.transformer, num_layers=2, num_attention_heads=2))

FEW_STEPS = replace(
    WAN_1_3B, defaults=replace(WAN_1_3B.defaults, guidance_scale=1.0, sampler="renoise", timesteps=(1000.0, 500.0))
)
OF_LORA = replace(FEW_STEPS, defaults=replace(FEW_STEPS.defaults, of_lora=True))


def request(spec: ModelSpec = WAN_1_3B, **fields: Any) -> ResolvedRequest:
    return GenerationRequest(prompt="x", seed=0, **fields).resolve(spec)


class Curve:
    """A predictor without a model, whose velocity bends with the noise level; counts its forwards."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __call__(self, latents: Tensor, step: Step, conditions: Sequence[float]) -> list[Tensor]:
        self.steps += [step.index] * len(conditions)
        time = step.timestep / 1000
        return [latents.tanh() * (1 + 0.3 * time * one) + 0.3 * (3 * latents + time).sin() for one in conditions]

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


def denoise(rule: Rule | None, steps: int, first: int = 0, stop: int | None = None, states: Any = None) -> Any:
    """Latents before each step of a run and after the last, the predictor, the states of sampler and predictor."""
    curve, sampler = Curve(), make_sampler(Schedule("unipc", 8.0, steps), 0, CPU)
    predictor: Any = curve if rule is None else StepCache(curve, rule, bool, CPU)
    sampler.begin_at(first)
    latents = torch.randn((1, 4, 3, 4, 4), generator=torch.Generator().manual_seed(1))
    if states is not None:
        first, latents, *saved = states
        sampler.restore(saved[0])
        predictor.restore(saved[1])
    path = [latents]
    for index in range(first, steps if stop is None else stop):
        positive, negative = predictor(latents, Step(index, sampler.timesteps[index]), (1.0, 0.5))
        latents = sampler.step(negative + 3.0 * (positive - negative), index, latents)
        path.append(latents)
    return path, predictor, curve.steps, (sampler.state(), predictor.state())


# EasyCache.


def easycache_as_published(path: list[Tensor], velocities: dict[int, Tensor], threshold: float) -> list[int]:
    """The steps that are skipped, by the latents before each step and the velocities of the computed steps."""
    skipped, error, k, last, before = [], 0.0, None, None, None
    for index, x in enumerate(path):
        change = 0.0 if k is None else k * float((x - before).abs().mean()) / float(velocities[last].abs().mean())
        error += change
        if k is not None and 10 <= index < len(path) - 1 and error < threshold:
            skipped.append(index)
        else:
            error, v = 0.0, velocities[index]
            if last is not None:
                k = float((v - velocities[last]).abs().mean() / (x - path[last]).abs().mean())
            last = index
        before = x
    return skipped


@pytest.mark.parametrize("threshold", [0.01, 0.05, 0.2])
def test_easycache_decides_as_published(threshold: float) -> None:
    path, predictor, computed, _ = denoise(EasyCache(threshold, 0, 50), 50)
    sampler = make_sampler(Schedule("unipc", 8.0, 50), 0, CPU)
    velocities = {
        index: Curve()(path[index], Step(index, sampler.timesteps[index]), (1.0,))[0] for index in set(computed)
    }
    assert predictor.skipped == easycache_as_published(path[:50], velocities, threshold)
    assert set(range(10)) | {49} <= set(computed)
    assert len(computed) == 2 * (50 - len(predictor.skipped))


def test_the_higher_the_threshold_the_more_is_skipped_and_lost() -> None:
    exact = denoise(None, 50)[0][-1]
    found = [denoise(EasyCache(threshold, 0, 50), 50) for threshold in (1e-9, 0.02, 0.2)]
    skipped = [len(one[1].skipped) for one in found]
    errors = [float((one[0][-1] - exact).norm() / exact.norm()) for one in found]
    assert skipped[0] == errors[0] == 0
    assert skipped[0] < skipped[1] < skipped[2]
    assert errors[0] < errors[1] < errors[2] < 0.5


def test_the_first_10_steps_are_those_of_the_run() -> None:
    _, predictor, computed, _ = denoise(EasyCache(1.0, 15, 50), 50, first=15)
    assert computed[:20:2] == list(range(15, 25))
    assert predictor.skipped == list(range(25, 49))


def test_a_skipped_step_moves_the_last_velocities_with_the_latents() -> None:
    cache = StepCache(Curve(), KnownSteps([1]), bool, CPU)
    x, y = torch.randn(2, 1, 4, 3, 4, 4).unbind()
    last = cache(x, Step(0, 900.0), (1.0, 0.5))
    for velocity, before in zip(cache(y, Step(1, 800.0), (1.0, 0.5)), last, strict=True):
        torch.testing.assert_close(velocity, y + (before - x))


def test_a_step_with_a_prompt_more_than_the_last_is_computed() -> None:
    curve = Curve()
    cache = StepCache(curve, KnownSteps([1, 2]), bool, CPU)
    x = torch.randn(1, 4, 3, 4, 4)
    cache(x, Step(0, 900.0), (1.0,))
    cache(x, Step(1, 800.0), (1.0, 0.5))
    assert len(cache(x, Step(2, 700.0), (1.0,))) == 1  # after a guidance gate
    assert (curve.steps, cache.skipped) == ([0, 1, 1], [2])


def test_the_first_rank_decides() -> None:
    curve, asked = Curve(), []
    cache = StepCache(curve, KnownSteps([2]), lambda own: asked.append(own) or len(asked) == 2, CPU)
    for index in range(3):
        cache(torch.randn(1, 4, 3, 4, 4), Step(index, 900.0), (1.0,))
    assert (asked, curve.steps, cache.skipped) == ([False, False, True], [0, 2], [1])


@pytest.mark.parametrize("rule", [lambda: EasyCache(0.05, 0, 30), lambda: KnownSteps([12, 13, 15, 16, 20])])
@pytest.mark.parametrize("stop", [1, 13, 14, 21])
def test_a_state_goes_on_bit_for_bit(rule: Any, stop: int) -> None:
    whole, predictor, _, _ = denoise(rule(), 30)
    begun, _, _, states = denoise(rule(), 30, stop=stop)
    rest, again, _, _ = denoise(rule(), 30, states=(stop, begun[-1], *states))
    assert predictor.skipped
    assert again.skipped == predictor.skipped
    assert torch.equal(rest[-1], whole[-1])


def test_a_new_run_starts_anew() -> None:
    cache = StepCache(Curve(), EasyCache(0.5, 0, 30), bool, CPU)
    denoised = denoise(EasyCache(0.5, 0, 30), 30)[1]
    denoised.restore({})
    assert (denoised.state(), denoised.skipped) == (cache.state(), []) == ({}, [])


# MagCache.


@pytest.mark.parametrize("spec", [WAN_1_3B, WAN_14B])
@pytest.mark.parametrize(
    ("threshold", "most", "forwards"), [(0.04, 2, 58), (0.06, 2, 54), (0.12, 2, 50), (0.12, 4, 42), (0.24, 6, 36)]
)
def test_magcache_computes_as_many_as_published(spec: ModelSpec, threshold: float, most: int, forwards: int) -> None:
    table = table_of(spec.transformer)
    assert table is not None
    skips = magcache_skips(table.ratios, threshold, most, 10)
    if (spec, threshold) == (WAN_14B, 0.06):
        forwards = 56
    assert 2 * skips.count(False) == forwards
    assert not any(skips[:10])
    assert not skips[-1]


@pytest.mark.parametrize("spec", [WAN_1_3B, WAN_14B])
@pytest.mark.parametrize("sampler", ["unipc-official", "unipc"])
def test_magcache_reads_its_table_as_it_is_on_the_steps_that_it_was_made_for(spec: ModelSpec, sampler: Any) -> None:
    table = table_of(spec.transformer)
    sigmas = make_sampler(Schedule(sampler, table.flow_shift, 50), 0, CPU).sigmas[:50]
    tolerance = 1e-6 if sampler == "unipc-official" else 0.02
    assert ratios_at(table, sigmas) == pytest.approx(table.ratios, abs=tolerance)
    for name, forwards in (("magcache", 50), ("magcache:0.24", 36)):
        found = Forwards.of(request(spec, step_cache=name, sampler=sampler), spec)
        assert (found.count, found.exact_count, found.is_estimate) == (forwards, 100, False)


def test_magcache_multiplies_the_ratios_between_the_noise_levels_of_longer_steps() -> None:
    table = table_of(WAN_1_3B.transformer)
    every = shifted(official_sigmas(50).tolist(), 8.0)
    halved = ratios_at(table, every[::2])
    pairs = [table.ratios[index] * table.ratios[index - 1] for index in range(2, 50, 2)]
    assert halved[1:] == pytest.approx(pairs)


def test_magcache_leaves_the_first_fifth_of_the_run_and_its_last_step() -> None:
    video = {"input_video": "sha256:0", "strength": 0.6}
    found = request(step_cache="magcache:1", num_inference_steps=50, **video)
    skipped = magcache_steps(found, WAN_1_3B)
    assert (found.first_step, found.num_denoising_steps) == (20, 30)
    assert min(skipped) == 26
    assert max(skipped) < 49
    assert 2 * (30 - len(skipped)) == Forwards.of(found, WAN_1_3B).count


# TeaCache.


def teacache_as_published(embeddings: Tensor, p: Sequence[float], threshold: float) -> int:
    total, computed = 0.0, 0
    for i in range(len(embeddings)):
        if i in (0, len(embeddings) - 1):
            should, total = True, 0.0
        else:
            d = ((embeddings[i] - embeddings[i - 1]).abs().mean() / embeddings[i - 1].abs().mean()).item()
            total += p[0] * d**4 + p[1] * d**3 + p[2] * d**2 + p[3] * d + p[4]
            should = total >= threshold
            total = 0.0 if should else total
        computed += should
    return computed


@pytest.mark.parametrize(("spec", "least"), [(WAN_1_3B, 0.02), (WAN_14B, 0.14)])
def test_teacache_computes_as_many_as_published(spec: ModelSpec, least: float) -> None:
    table = table_of(spec.transformer)
    changes = [least + 0.002 * (index * 7 % 50) for index in range(49)]  # `least`: where the polynomial is above 0
    sizes = list(accumulate(changes, lambda size, change: size * (1 + change), initial=1.0))
    embeddings = torch.tensor(sizes, dtype=torch.float64)[:, None] * torch.linspace(-1, 1, 8)
    counts = []
    for threshold in (0.02, 0.1, 0.3):
        skips = teacache_skips(embeddings, table.coefficients, threshold)
        counts.append(skips.count(False))
        assert counts[-1] == teacache_as_published(embeddings, table.coefficients, threshold)
        assert not skips[0]
        assert not skips[-1]
    assert len(set(counts)) > 1


def test_teacache_watches_the_time_embedding_of_the_run_s_steps() -> None:
    seen: list[Tensor] = []

    def embed(timesteps: Tensor) -> Tensor:
        seen.append(timesteps)
        return torch.stack([timesteps, timesteps * 2], 1) + 1000

    found = request(step_cache="teacache:1", num_inference_steps=20, input_video="sha256:0", strength=0.5)
    rule = make_rule(found, WAN_1_3B, embed)
    assert seen[0].tolist() == pytest.approx(make_sampler(Schedule("unipc", 8.0, 20), 0, CPU).timesteps[10:])
    x = torch.zeros(1)
    skipped = [step for step in range(20) if rule.skips(step, x, None)]
    assert skipped
    assert set(skipped) <= set(range(11, 19))


# What a request may name.


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("easycache", "easycache:0.05"),
        ("EasyCache:0.1", "easycache:0.1"),
        (" magcache ", "magcache:0.12"),
        ("magcache:.24", "magcache:0.24"),
        ("teacache", "teacache:0.08"),
    ],
)
def test_a_threshold_follows_the_name(text: str, setting: str) -> None:
    found = request(step_cache=text).step_cache
    assert found == setting
    assert request(step_cache=found).step_cache == setting


def test_a_default_threshold_is_the_model_s() -> None:
    assert str(StepCacheSetting.parse("teacache", WAN_14B.transformer)) == "teacache:0.14"
    assert StepCacheSetting.parse("off", WAN_14B.transformer) is None


@pytest.mark.parametrize(
    ("given", "spec", "allowed", "nearest"),
    [
        ({"step_cache": "easycash"}, WAN_1_3B, "one of off, easycache, magcache, teacache", "easycache"),
        ({"step_cache": "blur"}, WAN_1_3B, "one of off", None),
        ({"step_cache": "off:1"}, WAN_1_3B, "one of off", "off"),
        ({"step_cache": "magcache:much"}, WAN_1_3B, "a threshold may follow", "magcache"),
        ({"step_cache": "magcache:0"}, WAN_1_3B, "above 0 and at most 1", "magcache:0.12"),
        ({"step_cache": "magcache:nan"}, WAN_1_3B, "above 0 and at most 1", "magcache:0.12"),
        ({"step_cache": "easycache:2"}, WAN_1_3B, "above 0 and at most 1", "easycache:1.0"),
        ({"step_cache": "magcache"}, SMALL, "easycache for this model", "easycache"),
        ({"step_cache": "teacache:0.1"}, SMALL, "easycache for this model", "easycache"),
        ({"step_cache": "magcache", "num_inference_steps": 7}, WAN_1_3B, "off for fewer than 8 steps", "off"),
        ({"step_cache": "easycache", "num_inference_steps": 11}, WAN_1_3B, "off for fewer than 12 steps", "off"),
        (
            {"step_cache": "magcache", "num_inference_steps": 20, "input_video": "sha256:0", "strength": 0.3},
            WAN_1_3B,
            "this run has 6",
            "off",
        ),
        ({"guidance_gate": 0.5, "guidance_scale": 1.0}, WAN_1_3B, "1 without guidance", 1),
        ({"guidance_interval": "0.1-0.8", "guidance_scale": 1.0}, WAN_1_3B, "0-1 without guidance", "0-1"),
        ({"guidance_interval": "0.1-0.8", "guidance_gate": 0.5}, WAN_1_3B, "1 with guidance_interval=0.1-0.8", 1),
        ({"guidance_mode": "apg", "guidance_scale": 1.0}, WAN_1_3B, "cfg without guidance", "cfg"),
        ({"guidance_mode": "apg", "guidance_scale": 5.0}, OF_LORA, "cfg with few-step weights", "cfg"),
        ({"guidance_scale": 5.0}, FEW_STEPS, "distilled to run without guidance", 1),
        ({"step_cache": "easycache", "sampler": "renoise"}, WAN_1_3B, "off with the sampler renoise", "off"),
    ],
)
def test_what_does_not_go_together_is_refused(given: Any, spec: ModelSpec, allowed: str, nearest: object) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        request(spec, **given)
    assert allowed in refused.value.allowed
    if nearest is not None:
        assert refused.value.nearest == nearest


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, 0),
        ({"step_cache": "easycache"}, 4),
        ({"step_cache": "magcache"}, 3),
        ({"step_cache": "magcache", "guidance_scale": 1.0}, 2),
        ({"step_cache": "magcache", "guidance_mode": "apg"}, 4),
    ],
)
def test_the_memory_of_a_cache_is_that_of_a_few_latents(fields: Any, kept: int) -> None:
    found = request(**fields)
    assert kept_latents(found) == kept
    rule = make_rule(found, WAN_1_3B, lambda _: torch.zeros(1))
    if rule is None:
        return
    cache = StepCache(Curve(), rule, bool, CPU)
    for index in range(3):
        cache(torch.randn(1, 4, 3, 4, 4), Step(index, 900.0), (1.0, 0.5)[: 1 + found.uses_guidance])
    tensors = [one for value in cache.state().values() for one in (value if isinstance(value, list) else [value])]
    assert sum(isinstance(one, Tensor) and one.ndim == 5 for one in tensors) <= kept


# Forwards.


@pytest.mark.parametrize(
    ("fields", "count", "of"),
    [
        ({"guidance_gate": 0.5}, 75, 100),
        ({"guidance_gate": 0.7}, 85, 100),
        ({"guidance_gate": 0.0}, 50, 100),
        ({"guidance_gate": 0.5, "num_inference_steps": 7}, 11, 14),  # the middle step is guided
        ({"guidance_gate": 0.5, "step_cache": "magcache"}, 40, 100),
        ({"guidance_interval": "0.1-0.8"}, 85, 100),
        ({"guidance_interval": "0.5-1", "num_inference_steps": 7}, 10, 14),  # from step 4 on
        ({"guidance_interval": "0.5-1", "input_video": "sha256:0", "strength": 0.5, "num_inference_steps": 20}, 15, 20),
        ({"guidance_mode": "cfg-zero"}, 96, 96),
        ({"guidance_mode": "cfg-zero", "guidance_interval": "0-0.5"}, 71, 96),
        ({"guidance_mode": "cfg-zero", "input_video": "sha256:0", "strength": 0.5}, 50, 50),
    ],
)
def test_forwards_of_steps_without_guidance(fields: Any, count: int, of: int) -> None:
    found = Forwards.of(request(**fields), WAN_1_3B)
    assert (found.count, found.exact_count, found.is_estimate) == (count, of, False)


def test_easycache_s_forwards_are_an_estimate_that_falls_with_its_threshold() -> None:
    found = [Forwards.of(request(step_cache=f"easycache:{x}"), WAN_1_3B) for x in (0.01, 0.05, 0.2)]
    assert all(one.is_estimate for one in found)
    assert 100 > found[0].count > found[1].count > found[2].count >= 22
