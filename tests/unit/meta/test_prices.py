"""Stored prices: whose they are, what is found of them, and what a damaged file does."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wanduet.family.wan21 import WAN_1_3B
from wanduet.meta.prices import (
    FILE,
    Prices,
    Subject,
    all_prices,
    card_of,
    exact,
    find_prices,
    in_words,
    price_of,
    settings_key,
    share_of_time,
    store_prices,
    worst_of,
)
from wanduet.request import GenerationRequest, ResolvedRequest

CACHED = {"step_cache": "easycache:0.05"}
ABOUT = {"name": "mine", "hash": "abc"}
ROWS = {
    settings_key(CACHED): {
        "0": {"forwards": 40, "seconds": 2.0, "latents_error": 0.01, "psnr": 40.0, "jod": 9.9},
        "1": {"forwards": 44, "seconds": 4.0, "latents_error": 0.03, "psnr": 30.0, "jod": 9.0, "st_lpips": None},
        "2": {},  # could not be measured
    }
}


def request(**fields: Any) -> ResolvedRequest:
    return GenerationRequest(**{"prompt": "x", "seed": 1} | fields).resolve(WAN_1_3B)


def subject(**fields: Any) -> Subject:
    return Subject.of(request(**fields), ABOUT, "card", {"dtype": "bfloat16"})


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    about = {"versions": dict(subject().versions), "name": "mine", "model": "abc"}
    store_prices(tmp_path, subject(), Prices(about, ROWS))
    return tmp_path


def test_a_price_is_the_median_and_the_worst(stored: Path) -> None:
    prices = find_prices(stored, subject())
    assert prices is not None
    found = prices.of(CACHED)
    assert found is not None
    assert (found["prompts"], found["forwards"], found["seconds"]) == (2, 42, 3.0)
    assert found["latents_error"] == {"median": 0.02, "worst": 0.03}
    assert found["psnr"] == {"median": 35.0, "worst": 30.0}
    assert found["st_lpips"] is None
    assert prices.of({"step_cache": "easycache:0.1"}) is None
    assert in_words(found) == (
        "42 forwards, 3 s; latents differ by 2.0% (worst 3.0%), PSNR 35.0 dB (worst 30.0), JOD 9.45 (worst 9.00); "
        "over 2 prompts"
    )


@pytest.mark.parametrize("other", [{"prompt": "y"}, {"seed": 9}, {"fps": 8}, CACHED, {"guidance_gate": 0.5}])
def test_what_a_price_does_not_depend_on(stored: Path, other: dict[str, Any]) -> None:
    assert find_prices(stored, subject(**other)) is not None


@pytest.mark.parametrize(
    "other",
    [{"height": 720}, {"num_frames": 49}, {"num_inference_steps": 30}, {"guidance_scale": 4.0}, {"sampler": "euler"}],
)
def test_what_a_price_depends_on(stored: Path, other: dict[str, Any]) -> None:
    assert find_prices(stored, subject(**other)) is None
    assert find_prices(stored, replace(subject(), model="another")) is None
    assert find_prices(stored, replace(subject(), card="another")) is None


def test_only_approximations_have_a_price(stored: Path) -> None:
    assert request().approximations == {}
    assert request(step_cache="easycache", guidance_gate=0.5).approximations == CACHED | {"guidance_gate": 0.5}
    asked = GenerationRequest(prompt="x", seed=1, num_frames=9, guidance_gate=0.5, **CACHED)
    assert exact(asked) == GenerationRequest(prompt="x", seed=1, num_frames=9)
    assert price_of(stored, subject(), request().approximations) is None
    assert price_of(stored, subject(), request(**CACHED).approximations) is not None


def test_measurements_of_other_versions_are_not_shown(stored: Path) -> None:
    other = replace(subject(), versions=(("torch", "0.1"),))
    store_prices(stored, other, Prices({"versions": {"torch": "0.1"}, "name": "old"}, ROWS))
    assert [one.about["name"] for one in all_prices(stored)] == ["mine"]
    assert find_prices(stored, other) is not None


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": 1}', '{"a": {"about": 1, "rows": {"{}": {"0": {"seconds": "x"}}}}}']
)
def test_a_damaged_file_says_nothing_and_is_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    assert find_prices(tmp_path, subject()) is None
    assert all_prices(tmp_path) == []
    store_prices(tmp_path, subject(), Prices({}, ROWS))
    assert len(json.loads((tmp_path / FILE).read_text())) == 1
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize(
    "bad",
    [
        1,
        {"about": {}},
        {"about": {}, "rows": {"{}": {"0": {"seconds": 1.0}}}},
        {"about": {}, "rows": {"{}": {"0": {"seconds": 1.0, "forwards": 1, "psnr": "x"}}}},
        {"about": {}, "rows": {"{": {}}},
        {"about": {}, "rows": {}, "velocity_errors": {"{}": {"0": ["x"]}}},
        {"about": {}, "rows": {}, "from a later version": 1},
    ],
)
def test_damaged_prices_leave_the_others(stored: Path, bad: Any) -> None:
    content = json.loads((stored / FILE).read_text())
    (stored / FILE).write_text(json.dumps({"bad": bad} | content))
    assert [one.about["name"] for one in all_prices(stored)] == ["mine"]
    store_prices(stored, subject(height=720), Prices({}, ROWS))
    assert len(json.loads((stored / FILE).read_text())) == 2


def test_a_measure_that_is_no_number_is_none(stored: Path) -> None:
    row = {"forwards": 1, "seconds": 1.0, "psnr": 20.0, "jod": float("nan")}
    store_prices(stored, subject(), Prices({}, {"{}": {"0": row}}))
    prices = find_prices(stored, subject())
    assert prices is not None
    found = prices.of({})
    assert found is not None
    assert (found["psnr"]["worst"], found["jod"]) == (20.0, None)


def test_the_worst_of_a_model_over_all_its_sizes(stored: Path) -> None:
    other, about = subject(height=720), {"versions": dict(subject().versions), "name": "mine", "model": "abc"}
    about["request"] = dict(other.request)
    row = {"forwards": 1, "seconds": 1.0, "psnr": 20.0}
    store_prices(stored, other, Prices(about, {settings_key(CACHED): {"0": row}}))
    assert worst_of(stored, "abc", CACHED, "psnr") == (20.0, "832x720, 81 frames, 50 steps, guidance 6")
    assert worst_of(stored, "abc", CACHED, "latents_error") == (0.03, "")
    assert worst_of(stored, "abc", CACHED, "st_lpips") is None
    assert worst_of(stored, "another", CACHED, "psnr") is None
    with_lora = Subject.of(request(), ABOUT, "card", {"loras": (("a" * 64, 1.0, 0.0, 1.0),)})
    row = {"forwards": 1, "seconds": 1.0, "psnr": 10.0}
    about |= {"engine": dict(with_lora.engine)}
    store_prices(stored, with_lora, Prices(about, {settings_key(CACHED): {"0": row}}))
    found = worst_of(stored, "abc", CACHED, "psnr")
    assert found is not None
    assert found[0] == 20.0, "with LoRA, they are other weights"


def test_the_seconds_of_a_set_are_a_share_of_those_of_the_exact_job(stored: Path) -> None:
    about = {"versions": dict(subject().versions), "name": "mine", "model": "abc"}
    for height, seconds in ((720, 6.0), (1088, 7.0)):
        rows = {
            "{}": {"0": {"forwards": 100, "seconds": 10.0}},
            "{'a': 1}".replace("'", '"'): {"0": {"forwards": 60, "seconds": seconds}},
        }
        store_prices(stored, subject(height=height), Prices(about, rows))
    assert share_of_time(stored, "abc", {"a": 1}) == 0.7
    assert share_of_time(stored, "abc", {"a": 2}) is None
    assert share_of_time(stored, "another", {"a": 1}) is None


def test_a_card_is_named_by_its_devices() -> None:
    assert card_of(["B", "A", "B"]) == "A, 2x B"
