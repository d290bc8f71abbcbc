"""Low resolution first through the engine: sizes of the steps, the record, resuming, two ranks."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from wanduet.accelerate.low_res import LowRes
from wanduet.config import EngineConfig
from wanduet.doors.cli.commands import report
from wanduet.doors.cli.places import parse_place
from wanduet.engine.job import Job, OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.errors import CancelledError
from wanduet.media.latents import load_latents
from wanduet.media.provenance import summary
from wanduet.media.read import read_metadata
from wanduet.request import GenerationRequest

# So high a shift that two of the six steps are at 64x64.
FIELDS = {
    "prompt": "a red circle moving left on a black background",
    "height": 96,
    "width": 96,
    "num_frames": 5,
    "num_inference_steps": 6,
    "flow_shift": 20.0,
    "seed": 3,
    "low_res_first": True,
}
LOW = 2


@pytest.fixture(scope="module")
def engine(config: EngineConfig) -> Iterator[Engine]:
    with Engine(replace(config, checkpoint_seconds=0.0)) as one:
        yield one


def run(engine: Engine, path: Path, after: int | None = None, resume: bool = False, **fields: Any) -> tuple[Job, list]:
    """Return a job, and the sizes of the latents after its steps. `after`: cancel it after so many steps."""
    jobs: list[Job] = []
    sizes: list[tuple[int, int]] = []

    def watch(info: Any) -> None:
        sizes.append(tuple(info.latents.shape[-2:]))
        if info.step + 1 == after:
            jobs[0].cancel()

    output = OutputOptions(path, "ffv1", save_latents=True, resume=resume)
    jobs.append(engine.submit(GenerationRequest(**(FIELDS | fields)), output, watch=watch))
    jobs[0].result(120)
    return jobs[0], sizes


def latents(job: Job) -> torch.Tensor:
    return load_latents(job.result().videos[0].latents_path)[0]


@pytest.fixture(scope="module")
def made(engine: Engine, tmp_path_factory) -> tuple[Job, list]:
    return run(engine, tmp_path_factory.mktemp("made") / "a.mkv")


def test_first_steps_are_smaller_and_the_video_is_not(made: tuple[Job, list]) -> None:
    job, sizes = made
    assert sizes == [(8, 8)] * (LOW - 1) + [(12, 12)] * (6 - LOW + 1)  # the last of them is enlarged
    assert latents(job).shape[-2:] == (12, 12)


def test_a_seed_gives_about_the_same_video(engine: Engine, tmp_path: Path) -> None:
    """Both begin with the same noise. Another seed's latents differ by 0.7."""
    fields = {"num_inference_steps": 12, "flow_shift": 12.0, "seed": 4}
    exact, low = (
        latents(run(engine, tmp_path / f"{is_low}.mkv", low_res_first=is_low, **fields)[0]) for is_low in (False, True)
    )
    assert 1e-3 < (low - exact).norm() / exact.norm() < 0.3


def test_what_was_done_is_in_the_record(made: tuple[Job, list]) -> None:
    job, _ = made
    path = job.result().videos[0].path
    about, shown = read_metadata(path), report(job, job.result(), parse_place(f"{path.parent}/"))
    assert about["request"]["low_res_first"] is shown["settings"]["low_res_first"] is True
    assert about["low_res"] == shown["low_res"] == {"steps": LOW, "height": 64, "width": 64}
    assert (about["forwards"], about["skipped_steps"]) == (12, [])
    assert "low resolution first" in summary(about)
    (choice,) = [one for one in shown["plan"]["choices"] if one["setting"] == "low_res_first"]
    assert "the first 2 steps at 64x64" in choice["why"]


@pytest.mark.parametrize("after", [LOW - 1, LOW, LOW + 2])
def test_an_interrupted_job_goes_on_bit_for_bit(
    engine: Engine, made: tuple[Job, list], tmp_path: Path, after: int
) -> None:
    with pytest.raises(CancelledError):
        run(engine, tmp_path / "a.mkv", after=after)
    again, sizes = run(engine, tmp_path / "a.mkv", resume=True)
    assert len(sizes) == 6 - after
    assert torch.equal(latents(again), latents(made[0]))


def test_two_ranks_make_the_same_video(config: EngineConfig, engine: Engine, tmp_path: Path) -> None:
    """A prompt each, then with the guidance gate one sequence, whose parts change as the latents do."""
    alone = [run(engine, tmp_path / f"{name}.mkv", **fields)[0] for name, fields in RANKS.items()]
    with Engine(replace(config, devices="cpu,cpu", strategy="parallel")) as two:
        shared = [run(two, tmp_path / f"{name}_2.mkv", **fields) for name, fields in RANKS.items()]
    for one, (other, sizes) in zip(alone, shared, strict=True):
        assert sizes == [(8, 8)] * (LOW - 1) + [(12, 12)] * (6 - LOW + 1)
        assert other.plan.strategy == "parallel"
        # Products of half of 32 tokens are rounded in another way; other noise or another size changes more than a tenth.
        assert (latents(other) - latents(one)).abs().max() <= 1e-4 * latents(one).abs().max()


RANKS: dict[str, dict[str, Any]] = {"plain": {"guidance_scale": 1.0}, "gate": {"guidance_gate": 1 / 6}}


def test_at_least_one_step_has_either_size(engine: Engine) -> None:
    spec = engine.models.spec
    for shift, steps, low in ((20.0, 6, LOW), (1.0, 6, 1), (100.0, 2, 1), (100.0, 4, 3)):
        fields = FIELDS | {"flow_shift": shift, "num_inference_steps": steps}
        found = LowRes.of(GenerationRequest(**fields).resolve(spec), spec)
        assert found is not None
        assert (found.num_steps, found.height, found.width) == (low, 64, 64)
