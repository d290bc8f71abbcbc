"""Speeds and loss budgets: the fields that they set, what is refused, and that a resolved request means the same again."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wanduet.errors import InvalidRequestError
from wanduet.family import registry, speeds
from wanduet.family.spec import ModelSpec
from wanduet.family.speeds import SPEEDS, Price, not_measured, price_of_speed
from wanduet.family.wan21 import WAN_1_3B, WAN_14B
from wanduet.request import GenerationRequest, ResolvedRequest
from wanduet.weights.hub import open_model

FEW_STEPS = replace(
    WAN_1_3B,
    defaults=replace(
        WAN_1_3B.defaults,
        sampler="renoise",
        timesteps=(1000.0, 757.0, 522.0),
        num_inference_steps=3,
        guidance_scale=1.0,
    ),
)
ROOT = Path(__file__).parents[3]
MEASURED = {"near": 41.0, "fine": 36.0, "fast": 36.5, "draft": 20.0}


def measured(fields: Mapping[str, Any]) -> Price | None:
    found = [MEASURED[speed.name] for speed in SPEEDS[1:] if speed.fields == fields]
    return Price(found[0], "worst", "measured on this machine") if found else None


def measured_speed(name: str) -> Price | None:
    return measured(speeds.fields_set_by(name))


def resolve(spec: ModelSpec = WAN_1_3B, prices: Any = not_measured, **fields: Any) -> ResolvedRequest:
    return GenerationRequest(prompt="x", seed=0, **fields).resolve(spec, None, prices)


@pytest.mark.parametrize("spec", [member.spec for member in registry.MEMBERS], ids=lambda spec: spec.name)
def test_every_model_has_every_speed_and_each_takes_fewer_forwards_than_the_one_before(spec: ModelSpec) -> None:
    from wanduet.accelerate.skipped_steps import Forwards

    found = [resolve(spec, speed=speed.name) for speed in SPEEDS]
    counts = [Forwards.of(one, spec).count for one in found]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == len(SPEEDS)
    assert counts[0] == 100
    assert counts[-1] < 30
    assert [one.approximates for one in found] == [False, True, True, True, True]


def test_a_speed_is_the_fields_that_it_sets() -> None:
    for speed in SPEEDS:
        named, typed = resolve(speed=speed.name), resolve(**speed.fields)
        assert named.recorded() == typed.recorded(), "latents, digests and records do not depend on the name"
        assert (named.speed, typed.speed) == (speed.name, None)


@pytest.mark.parametrize(
    "fields",
    [
        {"speed": "fine"},
        {"speed": "fine", "step_cache": "off"},
        {"speed": "draft", "guidance_gate": 1.0},
        {"speed": "draft", "step_cache": "magcache"},
        {"speed": "fine", "guidance_scale": 1.0},
        {"speed": "exact"},
        {},
    ],
)
def test_a_resolved_request_means_the_same_again_also_where_speeds_have_changed(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    once = resolve(**fields)
    stored = once.as_request().model_dump(exclude_none=True)
    assert GenerationRequest(**stored).resolve(WAN_1_3B) == once
    known = GenerationRequest.model_fields.keys()
    in_metadata = {name: value for name, value in once.recorded().items() if name in known}
    assert GenerationRequest(**speeds.with_speed(in_metadata, once.speed)).resolve(WAN_1_3B) == once
    changed = {name: replace(one, fields={"step_cache": "teacache"}) for name, one in speeds.BY_NAME.items()}
    monkeypatch.setattr(speeds, "BY_NAME", {**changed, "exact": SPEEDS[0]})
    again = GenerationRequest(**stored).resolve(WAN_1_3B)
    assert again.recorded() == once.recorded()


def test_a_field_that_is_given_is_kept_and_the_price_is_unknown() -> None:
    whole, part = resolve(speed="fine"), resolve(speed="fine", step_cache="magcache:0.1")
    assert whole.price is not None
    assert (part.step_cache, part.price) == ("magcache:0.1", None)
    same = resolve(speed="fine", **SPEEDS[2].fields)
    assert same.price == whole.price
    assert resolve(speed="draft", step_cache="off").guidance_gate == SPEEDS[-1].fields["guidance_gate"]


@pytest.mark.parametrize("more", [{"sparse": 0.5}, {"quantize": "int8"}, {"guidance_gate": 0.5}], ids=str)
def test_with_another_approximation_the_price_of_a_speed_is_unknown(more: dict[str, Any]) -> None:
    assert resolve(prices=measured, speed="fine").price == measured_speed("fine")
    found = resolve(prices=measured, speed="fine", **more)
    assert found.approximations == SPEEDS[2].fields | more
    assert found.price is None, "together they lose more than was measured"
    assert found.as_request().resolve(WAN_1_3B, None, measured) == found


def test_published_prices_are_not_those_of_few_step_weights() -> None:
    assert price_of_speed("fine", WAN_1_3B, not_measured) is not None
    assert price_of_speed("fine", FEW_STEPS, not_measured) is None


def test_without_guidance_there_is_none_to_end() -> None:
    assert SPEEDS[-1].fields["guidance_gate"] < 1
    found = resolve(prices=measured, speed="draft", guidance_scale=1.0)
    assert (found.guidance_gate, found.price) == (1.0, measured_speed("draft"))
    assert found.as_request().resolve(WAN_1_3B, None, measured) == found


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [(19.0, "draft"), (20.5, "fast"), (36.2, "fast"), (36.8, "near"), (41.0, "near"), (42, "exact")],
)
def test_a_budget_chooses_the_fastest_speed_that_was_measured_to_keep_it(budget: float, chosen: str) -> None:
    found = resolve(prices=measured, loss_budget=budget)
    assert (found.speed, found.loss_budget) == (chosen, budget)
    assert found.price == (None if chosen == "exact" else measured_speed(chosen))
    assert found.recorded() == resolve(speed=chosen).recorded()
    again = found.as_request()
    assert (again.speed, again.loss_budget) == (chosen, None), "the choice does not change with later measurements"


def test_without_a_measurement_published_values_count_and_unknown_speeds_are_not_chosen() -> None:
    assert [resolve(loss_budget=budget).speed for budget in (25.0, 26.0)] == ["fine", "exact"]
    price = resolve(speed="fine").price
    assert price is not None
    assert "published" in price.source
    assert price_of_speed("fine", WAN_1_3B, measured) == measured_speed("fine")
    assert resolve(WAN_14B, loss_budget=1.0).speed == "exact"
    assert resolve(WAN_14B, speed="fast").price is None


# PSNR, and seconds as a share of the exact job's, of each speed alone and with attention in 8 bits.
TIMED = {
    ("exact", "int8"): (44.0, 0.8), ("exact", "int8-fast"): (43.0, 1.02),
    ("near", "off"): (41.0, 0.6), ("near", "int8"): (39.0, 0.45), ("near", "int8-fast"): (33.0, 0.41),
    ("fine", "off"): (36.0, 0.42), ("fine", "int8"): (35.5, 0.43),
}  # fmt: skip


def timed(fields: Mapping[str, Any]) -> Price | None:
    for (speed, attention), (psnr, time) in TIMED.items():
        if {"quantize_attention": "off", **fields} == {**speeds.fields_set_by(speed), "quantize_attention": attention}:
            return Price(psnr, "worst", "measured on this machine", time)
    return None


@pytest.mark.parametrize(
    ("budget", "speed", "attention"),
    [
        (45.0, "exact", "off"),
        (43.5, None, "int8"),
        (42.5, None, "int8"),  # the other format takes longer than the exact job
        (40.0, "near", "off"),
        (38.0, "near", "int8"),
        (35.0, "fine", "off"),  # its 8-bit form takes longer
        (30.0, "near", "int8-fast"),
    ],
)
def test_a_budget_chooses_attention_in_8_bits_where_it_was_measured_to_be_faster(
    budget: float, speed: str | None, attention: str
) -> None:
    found = resolve(prices=timed, loss_budget=budget)
    assert (found.speed, found.quantize_attention) == (speed, attention)
    assert ("quantize_attention" in found.recorded()) == (attention != "off")
    assert (found.price is None) == (speed == "exact")
    assert found.price is None or found.price.psnr >= budget
    again = found.as_request()
    assert again.loss_budget is None
    assert again.resolve(WAN_1_3B, None, timed) == found.model_copy(update={"loss_budget": None})


def test_without_a_budget_or_a_measurement_attention_is_exact() -> None:
    assert [resolve(prices=timed, speed=speed.name).quantize_attention for speed in SPEEDS] == ["off"] * len(SPEEDS)
    assert resolve(loss_budget=1.0).quantize_attention == "off"
    assert resolve(prices=timed, loss_budget=38, loras=[{"name": "style.safetensors"}]).quantize_attention == "off"


def test_attention_in_8_bits_is_not_for_weights_with_one_of_their_own() -> None:
    vsa = replace(WAN_1_3B, transformer=replace(WAN_1_3B.transformer, attention="vsa"))
    with pytest.raises(InvalidRequestError, match="whose self-attention is VSA"):
        resolve(vsa, quantize_attention="int8")


@pytest.mark.parametrize(("strength", "chosen"), [(0.5, "exact"), (0, "draft")])
def test_with_lora_they_are_other_weights_than_those_that_were_measured(strength: float, chosen: str) -> None:
    loras = [{"name": "style.safetensors", "strength": strength}]
    assert resolve(prices=measured, loss_budget=1.0, loras=loras).speed == chosen
    assert (resolve(prices=measured, speed="fine", loras=loras).price is None) == (chosen == "exact")


def test_a_budget_does_not_choose_what_a_run_cannot_have() -> None:
    assert resolve(prices=measured, loss_budget=10, num_inference_steps=11).speed == "exact"
    assert resolve(FEW_STEPS, prices=measured, loss_budget=10).speed == "exact"
    with pytest.raises(InvalidRequestError, match="num_frames=80"):
        resolve(prices=measured, loss_budget=10, num_frames=80)


@pytest.mark.parametrize(
    ("spec", "fields", "field", "says"),
    [
        (WAN_1_3B, {"speed": "near", "num_inference_steps": 8}, "speed", "step_cache='easycache:0.02'.+ has 8"),
        (WAN_1_3B, {"speed": "draft", "sampler": "renoise"}, "speed", "sampler renoise"),
        (FEW_STEPS, {"speed": "near"}, "speed", "3 steps are fast already"),
        (WAN_1_3B, {"speed": "exact", "step_cache": "easycache"}, "speed", "step_cache=easycache:0.05"),
        (WAN_1_3B, {"speed": "exact", "guidance_gate": 0.5}, "speed", "guidance_gate=0.5"),
        (WAN_1_3B, {"speed": "fine", "loss_budget": 30}, "speed", "leave one of the two out"),
        (WAN_1_3B, {"loss_budget": 30, "step_cache": "easycache"}, "step_cache", "leave one of the two out"),
        (WAN_1_3B, {"loss_budget": 30, "guidance_gate": 0.5}, "guidance_gate", "leave one of the two out"),
        (WAN_1_3B, {"loss_budget": 30, "step_cache": "off"}, "step_cache", "leave one of the two out"),
        (WAN_1_3B, {"loss_budget": 30, "guidance_gate": 1.0}, "guidance_gate", "leave one of the two out"),
        (
            FEW_STEPS,
            {"step_cache": "easycache", "num_inference_steps": 50, "sampler": "euler"},
            "step_cache",
            "distilled for 3 steps",
        ),
        (FEW_STEPS, {"speed": "near", "num_inference_steps": 50}, "speed", "3 steps are fast already"),
        (WAN_1_3B, {"loss_budget": 30, "sparse": 0.5}, "sparse", "beside a speed is not known"),
        (WAN_1_3B, {"loss_budget": 30, "quantize_attention": "int8"}, "quantize_attention", "leave one of the two out"),
        (WAN_1_3B, {"loss_budget": 30, "quantize": "fp8"}, "quantize", "beside a speed is not known"),
        (WAN_1_3B, {"speed": "exact", "sparse": 0.5, "quantize": "fp8"}, "speed", "with sparse=0.5, quantize=fp8"),
        (WAN_1_3B, {"speed": "near", "step_cache": "easycache:2"}, "step_cache", "at most 1"),
        (WAN_1_3B, {"speed": "draft", "guidance_gate": 0.9, "guidance_scale": 1}, "guidance_gate", "without guidance"),
    ],
)
def test_pairs_that_do_not_go_together(spec: ModelSpec, fields: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says) as refused:
        resolve(spec, **fields)
    assert refused.value.field == field


def test_exact_is_allowed_for_few_step_weights() -> None:
    assert resolve(FEW_STEPS, speed="exact").recorded() == resolve(FEW_STEPS).recorded()


def test_the_published_prices_of_the_miniature_are_those_that_were_measured() -> None:
    rows = json.loads((ROOT / "benchmarks/results/step_caches_miniature.json").read_text())["sections"]["miniature"]
    found = {row["speed"]: row for row in rows if "speed" in row}
    miniature = open_model("miniature").spec
    for speed in SPEEDS[1:]:
        assert speed.fields.items() <= found[speed.name].items(), (
            "the speeds have changed: run benchmarks/step_caches.py"
        )
        price = price_of_speed(speed.name, miniature, not_measured)
        assert price is not None
        assert price.psnr == round(found[speed.name]["psnr_worst"], 1)
    goals = {"near": (58, 38), "fine": (40, 34)}
    assert all(found[name]["forwards"] <= most for name, (most, _) in goals.items())
    assert all(found[name]["psnr_worst"] >= least for name, (_, least) in goals.items())
