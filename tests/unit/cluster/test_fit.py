"""Fits come from the plan, by the demand that stands in a job's row."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from wanduet.cluster.fit import Fitter, parse_demand
from wanduet.cluster.shapes import Node, Shape, declared_devices
from wanduet.config import EngineConfig
from wanduet.errors import InvalidRequestError
from wanduet.family.wan21 import WAN_1_3B
from wanduet.jobs.records import SHORT_NAMES, demand_of
from wanduet.jobs.schema import jobs
from wanduet.planning.hardware import parse_hardware
from wanduet.planning.planner import make_plan
from wanduet.request import OFF_VALUES, GenerationRequest
from wanduet.runtime.models import Models

SMALL, FULL_HD = "480x832x81/50/2/1", "1080x1920x81/50/2/1"


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(EngineConfig(model="random:1.3b"))


def shape(gpus: str) -> Shape:
    devices = declared_devices(gpus)
    return Node("n", "n", devices, 64 * 2**30, 8).shape(len(devices))


@given(
    st.sampled_from([(480, 832), (1080, 1920), (None, None)]),
    st.sampled_from([None, 1, 81]),
    st.sampled_from([None, 1.0, 6.0]),
    st.sampled_from([None, 7]),
    st.sampled_from([1, 3]),
    st.sampled_from([(None, None), ("sha256:0", None), ("sha256:0", 0.0), ("sha256:0", 0.37), ("sha256:0", 1.0)]),
    st.sampled_from(
        [
            {},
            {"step_cache": "magcache:0.06"},
            {"step_cache": "easycache:0.1", "guidance_gate": 0.3},
            {"guidance_interval": "0.15-0.8"},
            {"guidance_mode": "apg"},
            {"guidance_mode": "cfg-zero", "guidance_gate": 0.5},
        ]
    ),
    st.sampled_from(
        [
            {},
            {"sparse": 0.5},
            {"quantize": "int8", "sparse": 0.25},
            {"low_res_first": True},
            {"quantize_attention": "int8-fast"},
        ]
    ),
)
def test_a_demand_says_everything_that_memory_and_time_depend_on(
    size, frames, scale, steps, videos, given, skips, others
) -> None:
    request = GenerationRequest(
        prompt="a cat", height=size[0], width=size[1], num_frames=frames, guidance_scale=scale,
        num_inference_steps=steps, num_videos_per_prompt=videos, seed=5, input_video=given[0], strength=given[1], **skips, **others,
    )  # fmt: skip
    try:
        meant = request.resolve(WAN_1_3B)
    except InvalidRequestError:  # too few steps to skip any
        assume(False)
    demand = demand_of(request.model_dump())
    said = parse_demand(demand, WAN_1_3B)
    for name in ("generated_height", "generated_width", "num_frames", "num_inference_steps", "uses_guidance",
                 "num_videos_per_prompt", "num_denoising_steps", "uses_input", "step_cache", "guided_steps", "num_zero_steps",
                 "sparse", "quantize", "quantize_attention", "low_res_first", "guidance_mode"):  # fmt: skip
        assert getattr(said, name) == getattr(meant, name)


def test_the_longest_demand_has_room_in_its_column() -> None:
    shares = {"sparse": 1.23456789e-5, "step_cache": "easycache:0.0123456789"}
    alone = [{"guidance_gate": 1.23456789e-5}, {"guidance_interval": "0.12-0.98"}]  # one of them
    modes = [{"guidance_mode": "cfg-zero"}, {"guidance_mode": "apg"}]
    letters: set[str] = set()
    for more in (*({**shares, **one, **mode} for one in alone for mode in modes), {"low_res_first": True}):
        request = GenerationRequest(
            prompt="a cat", height=1088, width=1920, num_frames=1025, guidance_scale=6.0, num_inference_steps=1000,
            num_videos_per_prompt=64, input_video="sha256:0", strength=0.123456789, quantize="int8",
            quantize_attention="int8-fast", loras=["a" * 250] * 32, **more,
        )  # fmt: skip
        demand = demand_of(request.model_dump())
        assert len(demand) <= jobs.c.demand.type.length
        letters |= {letter for letter in SHORT_NAMES if f"/{letter}=" in demand}
    assert set(OFF_VALUES) == set(SHORT_NAMES.values())
    assert letters == set(SHORT_NAMES)


@pytest.mark.parametrize("gpus", ["1x2GiB", "1x24GiB", "2x24GiB"])
@pytest.mark.parametrize("demand", [SMALL, FULL_HD])
def test_a_fit_is_what_the_plan_says(models: Models, gpus: str, demand: str) -> None:
    config = EngineConfig(model="random:1.3b")
    plan = make_plan(parse_demand(demand, models.spec), models.memory, config, shape(gpus).hardware, nearest=False)
    found = Fitter(models.memory, config).on(shape(gpus))(demand)
    assert found.fits == plan.prediction.fits
    assert found.peak_bytes == max(device.peak for device in plan.prediction.devices)


def test_skipped_steps_take_no_time(models: Models) -> None:
    fitter, hardware = Fitter(models.memory, EngineConfig(model="random:1.3b")), shape("1x24GiB").hardware
    whole, cached, gated = (
        fitter.plan(f"{SMALL}{more}", hardware).prediction.seconds.denoise
        for more in ("", "/c=magcache:0.12", "/c=magcache:0.12/g=0.5")
    )
    assert gated < 0.45 * whole < cached < 0.55 * whole


def test_what_is_too_large_for_one_card_fits_a_larger_one(models: Models) -> None:
    fitter = Fitter(models.memory, EngineConfig(model="random:1.3b"))
    assert [fitter.on(shape(gpus))(FULL_HD).fits for gpus in ("1x2GiB", "1x80GiB")] == [False, True]
    assert fitter.on(shape("1x80GiB"))(SMALL).seconds < fitter.on(shape("1x80GiB"))(FULL_HD).seconds


def test_a_strategy_that_needs_two_devices_fits_no_single_one(models: Models) -> None:
    fitter = Fitter(models.memory, EngineConfig(model="random:1.3b", strategy="placed"))
    assert [fitter.on(shape(gpus))(SMALL).fits for gpus in ("1x80GiB", "2x24GiB")] == [False, True]


def test_a_job_that_no_plan_can_be_made_for_goes_anywhere_and_fails_there(models: Models) -> None:
    fitter = Fitter(models.memory, EngineConfig(model="random:1.3b"))
    assert fitter.on(shape("1x24GiB"))("481x833x80/50/2/1").fits
    assert fitter.on(shape("1x24GiB"))("").fits
    for demand in ("nonsense", f"{SMALL}/x", f"{SMALL}/2", f"{SMALL}/0.5/0.5", f"{SMALL}/seed=1"):
        with pytest.raises(InvalidRequestError):
            parse_demand(demand, WAN_1_3B)


def test_products_that_a_card_does_not_have_go_to_one_that_has_them(models: Models) -> None:
    fitter = Fitter(models.memory, EngineConfig(model="random:1.3b"))
    older, newer = (
        replace(shape("1x24GiB"), devices=parse_hardware(card).devices) for card in ("RTX 3090", "RTX 4090")
    )
    fits = [[fitter.on(one)(f"{SMALL}/q={name}").fits for one in (older, newer)] for name in ("fp8", "int8")]
    assert fits == [[False, True], [True, True]]


def test_part_of_an_uneven_node_is_as_small_as_its_smallest_card() -> None:
    node = Node("n", "n", declared_devices("24GiB_12GiB"), 64 * 2**30, 8)
    assert [one.name for one in node.shapes()] == ["1x12GiB", "2x12GiB"]
    assert [d.total_bytes // 2**30 for d in node.shape(2).devices] == [24, 12]
