"""Sparse attention through the engine: when it is sparse, what is recorded, that it resumes. (Ranks: test_strategies.py.)"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from wanduet.config import EngineConfig
from wanduet.doors.cli.commands import report
from wanduet.doors.cli.places import parse_place
from wanduet.engine.job import Job, OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.errors import CancelledError, InvalidRequestError
from wanduet.kernels import verdicts
from wanduet.kernels.attention import sparse_steps
from wanduet.kernels.attention.sparse import KeyLists, plain_listed
from wanduet.media.latents import load_latents
from wanduet.media.provenance import summary
from wanduet.media.read import read_metadata
from wanduet.request import GenerationRequest

# 4 x 4 x 5 tokens: five blocks of 16.
SMALL = {
    "prompt": "a red circle moving left on a black background",
    "height": 64,
    "width": 64,
    "num_frames": 17,
    "num_inference_steps": 4,
    "seed": 3,
}
SPARSE = SMALL | {"sparse": 0.5}
FIRST = 1  # of the four steps, a quarter is dense


@pytest.fixture(scope="module")
def engine(config: EngineConfig) -> Iterator[Engine]:
    with Engine(replace(config, checkpoint_seconds=0.0)) as one:
        yield one


def run(engine: Engine, path: Path, after: int | None = None, resume: bool = False, **fields: Any) -> Job:
    """Run a job; `after`: cancel it after so many steps."""
    jobs: list[Job] = []
    output = OutputOptions(path, "ffv1", save_latents=True, resume=resume)

    def watch(info: Any) -> None:
        if info.step + 1 == after:
            jobs[0].cancel()

    jobs.append(engine.submit(GenerationRequest(**fields), output, watch=watch))
    jobs[0].result(120)
    return jobs[0]


def latents(job: Job) -> torch.Tensor:
    return load_latents(job.result().videos[0].latents_path)[0]


@pytest.fixture(scope="module")
def made(engine: Engine, tmp_path_factory) -> Job:
    return run(engine, tmp_path_factory.mktemp("made") / "a.mkv", **SPARSE)


@pytest.fixture(scope="module")
def exact(engine: Engine, tmp_path_factory) -> Job:
    return run(engine, tmp_path_factory.mktemp("exact") / "a.mkv", **SMALL)


def test_steps_after_the_first_quarter_are_sparse_in_all_blocks_but_the_first(
    engine: Engine, exact: Job, tmp_path: Path, key_lists: list[KeyLists]
) -> None:
    job = run(engine, tmp_path / "a.mkv", **SPARSE)
    blocks = engine.models.spec.transformer.num_layers
    assert len(key_lists) == (4 - FIRST) * (blocks - 1) * 2  # both prompts
    assert {(int(lists.count.max()), lists.index.shape[2], lists.query_size) for lists in key_lists} == {(3, 5, 16)}
    error = (latents(job) - latents(exact)).norm() / latents(exact).norm()
    assert 1e-4 < error < 0.5
    run(engine, tmp_path / "b.mkv", **(SMALL | {"num_inference_steps": 2}))
    assert len(key_lists) == (4 - FIRST) * (blocks - 1) * 2  # the next job is dense again


def test_nan_is_computed_again_with_all_keys(engine: Engine, exact: Job, tmp_path: Path, monkeypatch) -> None:
    def nan(*given: Any) -> Any:
        return tuple(one * torch.nan for one in plain_listed(*given))

    monkeypatch.setattr(sparse_steps, "PLAIN", sparse_steps.ListedBackend("plain", nan))
    sparse_steps.choose_listed.cache_clear()
    job = run(engine, tmp_path / "a.mkv", **SPARSE)
    sparse_steps.choose_listed.cache_clear()
    assert (latents(job) - latents(exact)).norm() < 1e-4 * latents(exact).norm()  # sums in another order
    about = job.result().videos[0].provenance
    assert about["attention"] == "sdpa"
    assert any("plain kernels after NaN" in note for note in about["rungs"])


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Let a kernel fail from a call in the third step on; `others` are behind it."""

    def from_step_3_on(*others: sparse_steps.ListedBackend, checked: int = 1) -> None:
        counts = [0]

        def listed(*given: Any) -> Any:
            counts[0] += 1
            if counts[0] > checked + 13:  # ten a step: five blocks, two prompts
                raise RuntimeError("no such instruction")
            return plain_listed(*given)

        first = sparse_steps.ListedBackend("fast", listed)
        monkeypatch.setattr(sparse_steps, "listed_backends", lambda *_: (first, *others))
        sparse_steps.choose_listed.cache_clear()

    verdicts.forget()
    yield from_step_3_on
    verdicts.forget()
    sparse_steps.choose_listed.cache_clear()


def test_a_kernel_that_fails_in_mid_job_is_replaced_by_the_next_one(
    engine: Engine, made: Job, tmp_path: Path, fails: Any
) -> None:
    fails(sparse_steps.PLAIN)
    first, second = (run(engine, tmp_path / f"{name}.mkv", **SPARSE) for name in "ab")
    about, later = (job.result().videos[0].provenance for job in (first, second))
    assert torch.equal(latents(first), latents(made))
    assert about["attention"] == "sdpa+sparse fast, then sdpa+sparse plain"
    reason = "RuntimeError: no such instruction, at step 3"
    assert about["rungs"] == [f"denoise: sparse attention by plain in place of sparse attention by fast ({reason})"]
    assert (later["attention"], later["rungs"]) == ("sdpa+sparse plain", [])  # it is not tried again


def test_after_the_last_kernel_all_keys_are_read_and_a_resume_goes_on_with_them(
    engine: Engine, made: Job, exact: Job, tmp_path: Path, fails: Any
) -> None:
    fails()
    whole = run(engine, tmp_path / "a.mkv", **SPARSE)
    about = whole.result().videos[0].provenance
    assert about["attention"] == "sdpa+sparse fast, then sdpa"
    assert about["rungs"][0].startswith("denoise: all keys in place of sparse attention by fast (RuntimeError")
    assert about["price"] is None, "no price is that of steps with all keys"
    assert not any(torch.equal(latents(whole), latents(one)) for one in (made, exact))
    verdicts.forget()
    fails()
    with pytest.raises(CancelledError):
        run(engine, tmp_path / "b.mkv", after=3, **SPARSE)
    again = run(engine, tmp_path / "b.mkv", resume=True, **SPARSE)
    assert torch.equal(latents(again), latents(whole))
    notes = again.result().videos[0].provenance["rungs"]
    assert "denoise: all keys: sparse attention has failed here before" in notes
    assert any("in place of sparse attention by fast" in note for note in notes), "what the first run did is kept"


def test_an_interrupted_job_goes_on_bit_for_bit(engine: Engine, made: Job, tmp_path: Path) -> None:
    with pytest.raises(CancelledError):
        run(engine, tmp_path / "a.mkv", after=FIRST + 1, **SPARSE)
    again = run(engine, tmp_path / "a.mkv", resume=True, **SPARSE)
    assert torch.equal(latents(again), latents(made))


def test_what_was_done_is_in_the_record(made: Job, exact: Job) -> None:
    path = made.result().videos[0].path
    about, shown = read_metadata(path), report(made, made.result(), parse_place(f"{path.parent}/"))
    assert about["request"]["sparse"] == shown["settings"]["sparse"] == 0.5
    assert about["attention"] == shown["attention"] == "sdpa+sparse plain"
    assert (about["forwards"], about["skipped_steps"]) == (8, [])
    assert "0.5 of the keys" in summary(about)
    (choice,) = [one for one in shown["plan"]["choices"] if one["setting"] == "sparse"]
    assert "60% of the key blocks from step 2 on" in choice["why"]
    plain = read_metadata(exact.result().videos[0].path)
    assert "sparse" not in plain["request"]
    assert plain["attention"] == "sdpa"


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"num_inference_steps": 1}, "1 for a run of 1 step, as the first quarter"),
        ({"sparse": 0.9}, "80 tokens are too few blocks"),
        ({"sparse": 0.0}, "more than 0"),
        ({"sparse": 1.5}, "at most 1"),
    ],
)
def test_what_would_leave_out_nothing_is_refused(engine: Engine, fields: Any, allowed: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        GenerationRequest.parse(**(SPARSE | fields)).resolve(engine.models.spec)
    assert (refused.value.field, allowed in refused.value.allowed) == ("sparse", True)
