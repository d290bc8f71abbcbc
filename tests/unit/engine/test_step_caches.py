"""Step caches and the guidance gate through the engine: what they skip, that they resume, that ranks skip alike."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from wanduet.config import EngineConfig
from wanduet.doors.cli.commands import report
from wanduet.doors.cli.places import parse_place
from wanduet.engine import tools
from wanduet.engine.job import Job, OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.errors import CancelledError, InvalidRequestError
from wanduet.family import step_caches
from wanduet.family.wan21 import WAN_1_3B
from wanduet.media.latents import load_latents
from wanduet.media.read import read_frames, read_metadata
from wanduet.models.dit.model import WanTransformer
from wanduet.request import GenerationRequest
from wanduet.sampling.denoise import StepInfo

SMALL = {
    "prompt": "a red circle moving left on a black background",
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "seed": 3,
}
CACHED = {"num_inference_steps": 16, "step_cache": "easycache:0.4"}
SPARSE = {"sparse": 0.5, "height": 64, "width": 64}  # 32 tokens: two blocks
ALL_OTHERS = SPARSE | {"guidance_gate": 0.4, "quantize": "int8"}
RULES = {
    "easycache": {"step_cache": "easycache:0.4", "num_inference_steps": 16},
    "magcache": {"step_cache": "magcache", "num_inference_steps": 12},
    "teacache": {"step_cache": "teacache:0.6", "num_inference_steps": 12},
    "magcache and gate": {"step_cache": "magcache", "num_inference_steps": 12, "guidance_gate": 0.4},
    "all approximations": CACHED | ALL_OTHERS,
}
Run = Callable[..., Job]


@pytest.fixture(scope="module")
def engine(config: EngineConfig) -> Iterator[Engine]:
    with Engine(replace(config, devices="cpu", checkpoint_seconds=0.0)) as one:
        first = OutputOptions(config.data_folder / "first.mkv", "ffv1")  # with it, the self-test of the weights is done
        one.submit(GenerationRequest(**SMALL, num_inference_steps=1), first).result(120)
        yield one


@pytest.fixture(scope="module")
def ranks(config: EngineConfig) -> Iterator[Engine]:
    with Engine(replace(config, devices="cpu,cpu", strategy="parallel", checkpoint_seconds=0.0)) as one:
        yield one


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    """The constants of Wan2.1 1.3B, for the miniature too: they decide which steps are skipped, whatever the model."""
    shape, known = engine.models.spec.transformer, step_caches.table_of(WAN_1_3B.transformer)
    monkeypatch.setattr(step_caches, "TABLES", {(shape.num_layers, shape.dim): known})


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts of each forward."""
    seen, forward = [], WanTransformer.forward_cfg

    def spy(self: WanTransformer, *given: Any) -> Any:
        seen.append(len(given[2]))
        return forward(self, *given)

    monkeypatch.setattr(WanTransformer, "forward_cfg", spy)
    return seen


@pytest.fixture
def run(engine: Engine, tmp_path: Path) -> Run:
    """Run a job; `after`: cancel it after so many steps."""

    def whole(
        name: str = "a", by: Engine = engine, after: int | None = None, resume: bool = False, **changes: Any
    ) -> Job:
        def watch(info: StepInfo) -> None:
            steps.append(info.step)
            if info.step + 1 == after:
                jobs[0].cancel()

        jobs: list[Job] = []
        steps.clear()
        output = OutputOptions(tmp_path / f"{name}.mkv", "ffv1", save_latents=True, resume=resume)
        submitted = GenerationRequest(**(SMALL | changes))
        jobs.append(by.submit(submitted, output, watch=watch))
        jobs[0].result(120)
        return jobs[0]

    steps: list[int] = []
    whole.steps = steps  # type: ignore[attr-defined]
    return whole


def latents(job: Job) -> torch.Tensor:
    return load_latents(job.result().videos[0].latents_path)[0]


def skipped(job: Job) -> list[int]:
    return job.result().videos[0].provenance["skipped_steps"]


def psnr(job: Job, other: Job) -> float:
    first, second = (
        torch.stack([torch.from_numpy(frame.copy()) for frame in read_frames(one.result().videos[0].path)]).double()
        for one in (job, other)
    )
    return float(10 * torch.log10(255**2 / (first - second).square().mean()))


def test_easycache_makes_almost_the_same_video_with_fewer_forwards(run: Run, forwards: list[int]) -> None:
    exact = run("exact", num_inference_steps=30, flow_shift=3.0)
    assert sum(forwards) == 60
    forwards.clear()
    job = run("cached", num_inference_steps=30, flow_shift=3.0, step_cache="easycache")
    assert sum(forwards) == 60 - 2 * len(skipped(job)) < 50
    assert set(skipped(job)) <= set(range(10, 29))
    assert psnr(job, exact) > 25
    assert not torch.equal(latents(job), latents(exact))


def test_what_was_done_is_in_the_record_only_if_something_was_asked_for(run: Run, tmp_path: Path) -> None:
    job, plain = run("cached", **CACHED), run("plain", num_inference_steps=4)
    shown = report(job, job.result(), parse_place(f"{tmp_path}/"))
    about = read_metadata(tmp_path / "cached.mkv")
    for found in (shown, about, shown["videos"][0]):
        assert found["skipped_steps"] == skipped(job)
        assert found["forwards"] == 2 * (16 - len(skipped(job)))
    assert shown["settings"]["step_cache"] == about["request"]["step_cache"] == "easycache:0.4"
    planned = shown["plan"]["predicted_forwards"]
    assert planned == {"count": planned["count"], "of": 32, "is_estimate": True}
    about = read_metadata(tmp_path / "plain.mkv")
    everything = json.dumps([report(plain, plain.result(), parse_place(f"{tmp_path}/")), about])
    # With their quotes: the folder of the test has some of these words in its name.
    assert not any(f'"{word}"' in everything for word in ("skipped_steps", "step_cache", "guidance_gate", "forwards"))


def test_a_video_says_its_speed_and_what_that_loses(run: Run, engine: Engine, tmp_path: Path) -> None:
    job = run("draft", num_inference_steps=16, speed="draft")
    run("exact", num_inference_steps=2, speed="exact")
    price = {"psnr": {"worst": 21.4}, "source": "published with wanduet: four prompts, 50 steps"}
    shown = report(job, job.result(), parse_place(f"{tmp_path}/"))
    about = read_metadata(tmp_path / "draft.mkv")
    for found in (shown, shown["videos"][0], about):
        assert (found["speed"], found["price"]) == ("draft", price)
        assert found["forwards"] == 16 - len(skipped(job)) + 5, "5 steps are guided"
        assert found["forwards"] <= 17
    assert about["request"]["step_cache"] == "easycache:0.2"
    assert "speed" not in about["request"], "a later version may set other fields"
    assert (shown["plan"]["speed"], shown["plan"]["price"]) == ("draft", price)
    about = read_metadata(tmp_path / "exact.mkv")
    assert (about["speed"], about["price"]) == ("exact", None)
    assert "forwards" not in about
    path = job.result().videos[0].latents_path
    later = tools.decode_latents(engine.config, path, OutputOptions(tmp_path / "later.mkv", "ffv1")).videos[0]
    assert (later.provenance["speed"], later.provenance["price"]) == ("draft", price)


def test_latents_that_are_decoded_later_say_what_was_skipped(run: Run, engine: Engine, tmp_path: Path) -> None:
    job = run("made", **CACHED)
    path = job.result().videos[0].latents_path
    video = tools.decode_latents(engine.config, path, OutputOptions(tmp_path / "later.mkv", "ffv1")).videos[0]
    assert skipped(job)
    assert video.provenance["skipped_steps"] == skipped(job)


@pytest.mark.parametrize("rule", RULES)
def test_an_interrupted_job_goes_on_bit_for_bit(run: Run, tables: None, rule: str) -> None:
    whole = run("whole", **RULES[rule])
    after = skipped(whole)[0] + 1
    with pytest.raises(CancelledError):
        run("cut", after=after, **RULES[rule])
    again = run("cut", resume=True, **RULES[rule])
    assert run.steps[0] == after  # type: ignore[attr-defined]
    assert torch.equal(latents(again), latents(whole))
    assert skipped(again) == skipped(whole)


def test_ranks_skip_alike_and_go_on_from_a_checkpoint(run: Run, ranks: Engine) -> None:
    """Each rank has a prompt, and of both the last velocity; without guidance and after its gate, each has a part of the
    sequence."""
    gated = CACHED | {"guidance_gate": 0.4}
    sparse, plain = gated | SPARSE, CACHED | {"guidance_scale": 1.0}
    for name, changes, cfg in (("plain", plain, 1), ("gated and sparse", sparse, 2), ("gated", gated, 2)):
        single, shared = run(f"{name} single", **changes), run(name, ranks, **changes)
        assert shared.plan.group.layout.cfg == cfg
        assert skipped(single)
        assert skipped(shared) == skipped(single)
        assert torch.allclose(latents(shared), latents(single), atol=2e-5)
    with pytest.raises(CancelledError):
        run("cut", ranks, after=skipped(shared)[0] + 1, **gated)
    again = run("cut", ranks, resume=True, **gated)
    assert run.steps[0] > skipped(shared)[0]  # type: ignore[attr-defined]
    assert torch.equal(latents(again), latents(shared))


def test_ranks_quantize_as_one_device_does(run: Run, ranks: Engine, engine: Engine) -> None:
    """Each has a part of the sequence. Rounding to 8 bits turns differences in the last bit into its own error."""
    changes = {"num_inference_steps": 1, "guidance_scale": 1.0}
    exact = latents(run("exact", **changes))
    shared, single = (run(name, by, **changes, quantize="int8") for name, by in (("shared", ranks), ("single", engine)))
    layers = [job.result().videos[0].provenance["quantized_layers"] for job in (shared, single)]
    assert layers[0] == layers[1] > 0
    assert 0 < (latents(shared) - exact).norm() < 2 * (latents(single) - exact).norm()


def test_after_the_gate_a_step_is_one_forward(run: Run, forwards: list[int]) -> None:
    job = run(num_inference_steps=5, guidance_gate=0.5)
    assert forwards == [2, 2, 2, 1, 1]
    assert job.result().videos[0].provenance["forwards"] == 8
    never = run("never", num_inference_steps=5, guidance_gate=0.0)
    alone = run("alone", num_inference_steps=5, guidance_scale=1.0)
    assert torch.equal(latents(never), latents(alone))


def test_devices_apart_make_the_same(run: Run, engine: Engine) -> None:
    expected = latents(run("single", **CACHED))
    with Engine(replace(engine.config, devices="vae=cpu,transformer=cpu")) as other:
        placed = run("placed", other, **CACHED)
    assert placed.plan.strategy == "placed"
    assert torch.equal(latents(placed), expected)


def test_a_callback_that_may_change_latents_is_refused_with_a_cache(engine: Engine, tmp_path: Path) -> None:
    request = GenerationRequest(**SMALL, **CACHED)
    with pytest.raises(InvalidRequestError, match="on_step"):
        engine.submit(request, OutputOptions(tmp_path / "a.mkv", "ffv1"), lambda info: None)
