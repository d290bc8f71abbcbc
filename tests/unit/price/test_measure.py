"""A measurement with the miniature: what it finds, that it goes on where it stopped, and where its prices are shown."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from wanduet.config import EngineConfig
from wanduet.doors.cli.commands import run_generate, run_plan
from wanduet.doors.cli.places import parse_place
from wanduet.doors.cli.show import show
from wanduet.engine import tools
from wanduet.engine.job import OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.errors import CancelledError, ConfigError, InvalidRequestError, OutputError
from wanduet.media.files import UnreadableFileError
from wanduet.media.read import read_metadata
from wanduet.price import measure
from wanduet.price.measure import Measurement
from wanduet.price.report import report
from wanduet.price.runs import kept, make
from wanduet.price.variants import Variant
from wanduet.request import GenerationRequest

TINY = GenerationRequest(prompt="-", height=32, width=32, num_frames=1, num_inference_steps=12)
CACHED = {"step_cache": "easycache:1.0"}
VARIANTS = [
    Variant("rungs", "exact"),
    Variant("rungs", "draft", CACHED),
    Variant("accelerators", "the same", {"step_cache": "easycache:1"}),
    Variant("accelerators", "guidance gate 0.5", {"guidance_gate": 0.5}),
    Variant("accelerators", "weights q8", weights="q8"),
    Variant("accelerators", "magcache", {"step_cache": "magcache"}),
    Variant("fewer_steps", "6 steps", {"num_inference_steps": 6}),
    Variant("controls", "bf16_floor"),
    Variant("controls", "another_seed"),
]
Shown = list[tuple[str, float, float]]


@pytest.fixture(autouse=True, scope="module")
def _few_variants() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "all_variants", lambda *_: VARIANTS)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return EngineConfig(model="miniature", devices="cpu", data_dir=tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def interrupted(config: EngineConfig) -> tuple[int, Measurement]:
    """The videos that a measurement had to make, and the measurement, stopped by Ctrl-C in its third."""
    names: list[str] = []

    def stop(what: str, done: float, total: float) -> None:
        names.append(what)
        if len(set(names)) == 4:  # with the warm-up
            raise KeyboardInterrupt

    with Measurement(config, TINY, 1) as one:
        count = one.videos_left
        with pytest.raises(CancelledError, match="the same command goes on"):
            one.run(stop)
    return count, one


@pytest.fixture(scope="module")
def shown() -> Shown:
    return []


@pytest.fixture(scope="module")
def found(config: EngineConfig, interrupted: tuple[int, Measurement], shown: Shown) -> dict[str, Any]:
    """The result of the run that went on."""
    with Measurement(config, TINY, 1) as one:
        assert one.videos_left == interrupted[0] - 2
        one.run(lambda *progress: shown.append(progress))
        assert one.videos_left == 0
        return report(one)


def test_ctrl_c_leaves_what_was_measured_and_nothing_else(
    config: EngineConfig, interrupted: tuple[int, Measurement]
) -> None:
    count, one = interrupted
    assert count == 8, "one also along the exact video; equal variants are made once, and refused ones are not"
    assert set(one.prices.rows) == {"{}", '{"step_cache": "easycache:1.0"}'}
    assert [path.suffix for path in (config.data_folder / "checkpoints").rglob("*") if path.is_file()] == []


def test_each_row_has_seconds_forwards_and_losses(found: dict[str, Any]) -> None:
    exact, draft = found["rungs"]
    same, gate, q8 = found["accelerators"]
    (fewer,) = found["fewer_steps"]
    floor, seed = found["controls"]["bf16_floor"], found["controls"]["another_seed"]
    assert [exact["speed"], draft["speed"], gate["name"]] == ["exact", "draft", "guidance gate 0.5"]
    assert [row["forwards"] for row in (exact, draft, gate, q8, fewer, floor, seed)] == [24, 22, 18, 24, 12, 24, 24]
    assert draft["settings"] == same["settings"] == CACHED
    assert {name: draft[name] for name in ("seconds", "psnr")} == {name: same[name] for name in ("seconds", "psnr")}
    errors = [row["latents_error"]["worst"] for row in (exact, floor, q8, fewer, seed)]
    assert errors[0] == 0
    assert errors == sorted(set(errors)), "rounding is the floor, another seed the ceiling"
    assert exact["psnr"] == {"median": 100.0, "worst": 100.0}
    assert all(row["seconds"] > 0 and row["ssim"]["worst"] <= 1 for row in (exact, draft, gate, q8, fewer, floor, seed))
    assert list(found["refused"]) == ["magcache"]


def test_errors_along_the_exact_trajectory(found: dict[str, Any]) -> None:
    draft, gate, q8 = found["rungs"][1], found["accelerators"][1], found["accelerators"][2]
    assert [bool(error) for error in draft["velocity_errors"]] == [False] * 10 + [True, False]
    assert [bool(error) for error in gate["velocity_errors"]] == [False] * 6 + [True] * 6
    assert len(q8["velocity_errors"]) == 12
    assert all(0 < error < 0.5 for error in q8["velocity_errors"])


def test_progress_is_by_predicted_seconds(found: dict[str, Any], shown: Shown) -> None:
    done = [round(seconds, 9) for _, seconds, _ in shown]
    assert done == sorted(done)
    (total,) = {total for *_, total in shown}
    assert done[-1] == pytest.approx(total)
    assert "prompt 1 of 1: another_seed" in {name for name, *_ in shown}
    assert shown[-1][0] == "along the exact video: weights q8"


def test_a_finished_measurement_leaves_no_videos_and_loads_nothing(
    config: EngineConfig, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [path for path in (config.data_folder / "prices").rglob("*") if path.is_file()] == []
    monkeypatch.setattr(measure, "make", None)
    with Measurement(config, TINY, 1) as one:
        one.run(lambda *_: None)
        assert report(one)["rungs"] == found["rungs"]


def test_prices_are_shown_where_the_settings_are_used(
    config: EngineConfig, found: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    request = TINY.model_copy(update={"prompt": "a red circle on a black background", "seed": 7} | CACHED)
    plan = run_plan(request, config, None)
    expected = {name: value for name, value in found["rungs"][1].items() if name in plan["price"]}
    assert plan["price"] == expected
    show(plan)
    assert "Measured here: 22 forwards" in capfd.readouterr().out
    assert "price" not in run_plan(TINY, config, None)
    assert run_plan(request, config, "h100")["price"] is None, "prices are this machine's"
    options, place = OutputOptions(tmp_path / "a.mp4"), parse_place(str(tmp_path / "a.mp4"))
    made = run_generate(request, config, options, place)
    assert made["price"] == read_metadata(tmp_path / "a.mp4")["price"] == expected
    assert "Measured here: 22 forwards" in capfd.readouterr().err
    (of_model,) = tools.doctor(config)["prices"]
    assert of_model["costs"]["step_cache easycache:1.0"].startswith("22 forwards")
    show(found)
    assert "another_seed" in capfd.readouterr().out


def test_what_is_not_measured_has_no_price(config: EngineConfig, found: dict[str, Any]) -> None:
    assert run_plan(TINY.model_copy(update={"guidance_gate": 0.25}), config, None)["price"] is None
    assert run_plan(TINY.model_copy(update={"width": 48} | CACHED), config, None)["price"] is None


def test_two_at_once_would_slow_each_other_down(config: EngineConfig) -> None:
    other = TINY.model_copy(update={"num_inference_steps": 3})
    with (
        Measurement(config, TINY, 1),
        pytest.raises(ConfigError, match="Another `wanduet price`"),
        Measurement(config, other, 1),
    ):
        pass


def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(config: EngineConfig, tmp_path: Path) -> None:
    for count in (0, 9):
        with pytest.raises(InvalidRequestError, match="prompts"):
            Measurement(config, TINY, count)
    with pytest.raises(InvalidRequestError, match="input_video"):
        Measurement(config, TINY.model_copy(update={"input_video": "sha256:0"}), 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError), Measurement(replace(config, data_dir=tmp_path / "file"), TINY, 1):
        pass


def test_a_full_disk_ends_a_measurement(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(measure, "store_prices", full)
    short = TINY.model_copy(update={"num_inference_steps": 1})
    with Measurement(config, short, 1) as one, pytest.raises(OutputError, match="No space left"):
        one.run(lambda *_: None)


def test_the_fast_miniature_is_asked_for_what_it_knows(config: EngineConfig) -> None:
    with Measurement(config, TINY, 1) as one:
        prompts = one.made_of["prompts"]
    request = GenerationRequest(prompt="-", height=32, width=32, num_frames=1)
    with Measurement(replace(config, model="miniature-fast"), request, 1) as fast:
        assert fast.made_of["prompts"] == prompts
        assert fast.is_miniature


def test_kept_latents_of_another_request_are_not_compared(config: EngineConfig, tmp_path: Path) -> None:
    request = TINY.model_copy(update={"num_inference_steps": 1, "seed": 1})
    with Engine(config) as engine:
        made = make(engine, request, tmp_path / "exact-0", lambda _: None)
        assert torch.equal(kept(engine, request, tmp_path / "exact-0").latents, made.latents)
        for other in ({"seed": 2}, {"negative_prompt": "a star"}):
            with pytest.raises(UnreadableFileError, match="another request"):
                kept(engine, request.model_copy(update=other), tmp_path / "exact-0")
