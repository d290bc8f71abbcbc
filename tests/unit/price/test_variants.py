"""What is measured of a model: which changes of the exact request, and which of them it cannot run."""

import pytest

from wanduet.errors import ConfigError, InvalidRequestError
from wanduet.family.guidance import GuidanceMode
from wanduet.family.speeds import SPEEDS
from wanduet.family.wan21 import WAN_1_3B
from wanduet.price.variants import all_variants, possible
from wanduet.request import GenerationRequest

EXACT = GenerationRequest(prompt="x", seed=4, num_inference_steps=50)


def make_no_plan(request: GenerationRequest) -> None:
    """As on a machine that has everything."""


def without_fp8(request: GenerationRequest) -> None:
    if request.quantize == "fp8":
        raise InvalidRequestError("quantize", "fp8", "this card cannot compute fp8 products")


def without_sparse(request: GenerationRequest) -> None:
    if request.sparse < 1:
        raise ConfigError("these 5 devices do not divide the 12 heads.", hint="Leave --sparse out.")


def test_each_is_the_exact_job_but_for_one_thing() -> None:
    asked = {"step_cache": "easycache:0.3", "guidance_gate": 0.9}
    found, refused = possible(all_variants(50, asked, "auto"), EXACT, WAN_1_3B, make_no_plan)
    assert list(refused) == ["low resolution first"]  # not at 480p
    settings = {one.variant.name: one.settings for one in found}
    assert list(settings)[: len(SPEEDS)] == [speed.name for speed in SPEEDS]
    assert settings["exact"] == {}
    assert settings["magcache"] == {"step_cache": "magcache:0.12"}
    assert settings["as asked"] == asked
    assert settings["weights q8"] == {"weights": "q8"}
    assert [name for name in settings if name.endswith(" steps")] == ["30 steps", "25 steps", "20 steps", "15 steps"]
    assert len({one.key for one in found if one.variant.kind != "rungs"}) == len(found) - len(SPEEDS)
    (seed,) = [one.variant.request(EXACT).seed for one in found if one.variant.name == "another_seed"]
    assert seed != EXACT.seed
    (floor,) = [one.variant.request(EXACT) for one in found if one.variant.uses_other_kernels]
    assert floor == EXACT


@pytest.mark.parametrize(("mode", "others"), [("cfg", ["cfg-zero", "apg"]), ("apg", ["cfg", "cfg-zero"])])
def test_other_guidance_modes_are_changes_and_no_accelerators(mode: GuidanceMode, others: list[str]) -> None:
    exact = EXACT.model_copy(update={"guidance_mode": mode})
    found, _ = possible(all_variants(50, {}, "auto"), exact, WAN_1_3B, make_no_plan)
    settings = [one.settings for one in found if one.variant.kind == "changes"]
    assert settings == [{"guidance_mode": other} for other in others]
    interval = next(one for one in found if one.settings == {"guidance_interval": "0.1-0.7"})
    assert interval.variant.kind == "accelerators"


def test_each_speed_is_measured_with_attention_in_8_bits_where_a_budget_may_choose_it() -> None:
    without, found = ({one.name: one for one in all_variants(50, {}, "auto", choice)} for choice in (False, True))
    added = [found[name] for name in found.keys() - without.keys()]
    assert len(added) == 2 * (len(SPEEDS) - 1)
    assert all(one.fields["quantize_attention"] != "off" for one in added)
    one = found["near, attention in int8"]
    assert one.request(EXACT).resolve(WAN_1_3B).approximations == one.fields


def test_what_a_model_or_few_steps_cannot_do_is_left_out_by_name() -> None:
    two = EXACT.model_copy(update={"num_inference_steps": 2, "guidance_scale": 1.0})
    found, refused = possible(all_variants(2, {}, "q8"), two, WAN_1_3B, make_no_plan)
    expected = [
        "exact",
        "sparse 0.5",
        "sparse 0.2",
        "products in fp8",
        "products in int8",
        "attention in int8",
        "attention in int8-fast",
        "1 step",
        "bf16_floor",
        "another_seed",
    ]
    assert [one.variant.name for one in found] == expected
    assert "without guidance" in refused["guidance mode apg"]
    assert "without guidance" in refused["guidance gate 0.5"]
    assert "fewer than" in refused["easycache"]
    few = EXACT.model_copy(update={"num_inference_steps": None, "timesteps": (1000.0, 500.0), "sampler": "euler"})
    _, refused = possible(all_variants(2, {}, "q8"), few, WAN_1_3B, make_no_plan)
    assert "1 step" in refused, "timesteps stand in place of a number of steps"
    found, refused = possible(all_variants(2, {}, "q8"), two, WAN_1_3B, without_fp8)
    assert [one.variant.name for one in found] == [name for name in expected if name != "products in fp8"]
    assert refused["products in fp8"] == "this card cannot compute fp8 products"
    found, refused = possible(all_variants(2, {}, "q8"), two, WAN_1_3B, without_sparse)
    assert [one.variant.name for one in found] == [name for name in expected if "sparse" not in name]
    assert refused["sparse 0.5"] == "these 5 devices do not divide the 12 heads"
