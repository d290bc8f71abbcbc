"""Ranks that are cancelled or that fail while they decode or encode: what becomes of that job and of the next."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from wanduet.config import EngineConfig
from wanduet.distributed.rank import Rank
from wanduet.engine import ranks
from wanduet.engine.job import OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.engine.ranks import work
from wanduet.errors import CancelledError, InvalidRequestError, KernelFailedError, NonFiniteFramesError
from wanduet.media.read import read_frames, read_metadata
from wanduet.request import GenerationRequest
from wanduet.stages.record import VideoRecord

REQUEST = {"prompt": "a red circle", "height": 48, "width": 32, "num_frames": 9, "num_inference_steps": 4, "seed": 5}
LONG = {"num_frames": 65}
PARALLEL = {"strategy": "parallel", "devices": "cpu,cpu"}


@pytest.fixture(scope="module")
def guided(config, tmp_path_factory) -> Path:
    """The request's video, made by one device."""
    path = tmp_path_factory.mktemp("alone") / "guided.mkv"
    with Engine(config) as engine:
        engine.submit(GenerationRequest(**REQUEST), OutputOptions(path, "ffv1")).result(60)
    return path


def assert_looks_the_same(video: Path, other: Path) -> None:
    """But for a rounding in the latents: see test_strategies.py."""
    frames, others = (np.stack(list(read_frames(path))).astype(int) for path in (video, other))
    assert np.abs(frames - others).max() <= 2


def test_a_cancel_ends_a_decode_of_ranks_and_the_group_makes_the_next_job(config, guided, tmp_path) -> None:
    long = GenerationRequest(**(REQUEST | LONG))
    with Engine(replace(config, **PARALLEL)) as engine:
        job = engine.submit(long, OutputOptions(tmp_path / "a.mkv", "ffv1"))
        frames = 0
        for event in job.events():
            if event.phase == "decode":
                frames = event.done
                job.cancel()
        with pytest.raises(CancelledError):
            job.result(60)
        group = engine.models._group
        assert group is not None
        following = engine.submit(GenerationRequest(**REQUEST), OutputOptions(tmp_path / "b.mkv", "ffv1"))
        following.result(60)
        assert engine.models._group is group
    assert 0 < frames < 65
    assert not (tmp_path / "a.mkv").exists()
    assert_looks_the_same(tmp_path / "b.mkv", guided)


def work_that_fails_once_cancelled(rank: Rank, config: EngineConfig) -> None:
    """Ranks that fail in a decode or an encode as soon as they know of its cancel."""
    decode, read = ranks.decode_share, ranks.frames_of

    def known() -> bool:
        until = time.monotonic() + 0.2
        while not rank.cancelled_locally() and time.monotonic() < until:
            time.sleep(0.002)
        return rank.cancelled_locally()

    def decoded(*arguments: Any) -> Iterator[Any]:
        for part in decode(*arguments):
            yield part
            if known():
                raise NonFiniteFramesError("The VAE gave NaN.")

    def frames(request: Any) -> Any:
        def chunks() -> Iterator[Any]:
            for chunk in read(request)():
                yield chunk
                if known():
                    raise InvalidRequestError("input_video", "x.mkv", "a file that has not changed")

        return chunks

    ranks.decode_share, ranks.frames_of = decoded, frames
    work(rank, config)


def cancelled_in(
    engine: Engine, phase: str, request: GenerationRequest, path: Path, also: Callable[[], object]
) -> None:
    """Cancel a job in a phase, and do something else just before."""
    job = engine.submit(request, OutputOptions(path, "ffv1"))
    for event in job.events():
        if event.phase == phase and event.done and not job.cancelled:
            also()
            job.cancel()
    with pytest.raises(CancelledError):
        job.result(60)


@pytest.mark.parametrize("phase", ["decode", "encode_video"])
def test_what_fails_in_a_cancelled_task_does_not_reach_the_next_job(
    config, guided, tmp_path, monkeypatch, phase
) -> None:
    monkeypatch.setattr("wanduet.engine.group.work", work_that_fails_once_cancelled)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))
    first = LONG if phase == "decode" else {"input_video": str(guided), "strength": 0.5, "seed": 6}
    with Engine(replace(config, **PARALLEL)) as engine:
        engine.submit(GenerationRequest(**REQUEST), OutputOptions(tmp_path / "w.mkv", "ffv1")).result(60)
        cancelled_in(engine, phase, GenerationRequest(**(REQUEST | first)), tmp_path / "a.mkv", lambda: None)
        following = engine.submit(GenerationRequest(**REQUEST), OutputOptions(tmp_path / "b.mkv", "ffv1"))
        following.result(60)
    assert following.notes == []
    assert_looks_the_same(tmp_path / "b.mkv", guided)


def test_a_rank_killed_as_its_decode_is_cancelled_is_replaced_for_the_next_job(config, guided, tmp_path) -> None:
    with Engine(replace(config, devices="cpu,cpu")) as engine:  # the engine's own choice, which has a fallback

        def kill() -> None:
            os.kill(engine.models._group._ranks._processes[1].pid, signal.SIGKILL)

        cancelled_in(engine, "decode", GenerationRequest(**(REQUEST | LONG)), tmp_path / "a.mkv", kill)
        for name in ("b", "c"):
            following = engine.submit(GenerationRequest(**REQUEST), OutputOptions(tmp_path / f"{name}.mkv", "ffv1"))
            following.result(60)
            assert following.notes == []
            engine.models._group._ranks._processes[1].kill()  # while nothing runs
            engine.models._group._ranks._processes[1].join()
    about = read_metadata(tmp_path / "c.mkv")
    assert about["engine"]["strategy"] == "parallel"
    assert about["timings"].keys() == read_metadata(guided)["timings"].keys()  # no part of the decode's
    assert_looks_the_same(tmp_path / "c.mkv", guided)


def test_a_report_that_cannot_be_sent_is_an_error() -> None:
    def fail(message: object) -> None:
        raise MemoryError

    with pytest.raises(MemoryError), ranks.Reports(SimpleNamespace(report=fail)) as reports:
        reports.add(lambda: "the last one")


def work_with_a_broken_kernel(rank: Rank, config: EngineConfig) -> None:
    """Ranks whose decode meets a kernel that fails, after its first frames."""
    decode = ranks.decode_share

    def failing(*arguments: Any) -> Iterator[Any]:
        yield next(decode(*arguments))
        raise KernelFailedError("causal_conv", "no such instruction")

    ranks.decode_share = failing
    work(rank, config)


def test_a_kernel_that_fails_in_a_decode_of_ranks_costs_no_video(config, guided, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("wanduet.engine.group.work", work_with_a_broken_kernel)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))
    with Engine(replace(config, **PARALLEL)) as engine:
        job = engine.submit(GenerationRequest(**REQUEST), OutputOptions(tmp_path / "a.mkv", "ffv1"))
        job.result(60)
    (note,) = job.notes
    assert note.startswith("decode: on one device (The kernel for causal_conv failed")
    assert_looks_the_same(tmp_path / "a.mkv", guided)


def work_without_a_picture(rank: Rank, config: EngineConfig) -> None:
    """Ranks whose decode gives NaN."""

    def broken(*_: Any) -> Iterator[Any]:
        raise NonFiniteFramesError("The VAE gave NaN.")
        yield

    ranks.decode_share = broken
    work(rank, config)


def test_nan_in_a_decode_of_ranks_leaves_the_latents_and_says_so(config, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("wanduet.engine.group.work", work_without_a_picture)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))
    with Engine(replace(config, **PARALLEL)) as engine:
        job = engine.submit(GenerationRequest(**REQUEST), OutputOptions(tmp_path / "a.mkv", "ffv1"))
        with pytest.raises(NonFiniteFramesError) as caught:
            job.result(60)
    (kept,) = tmp_path.glob("*.latents.safetensors")
    assert f"wanduet decode {kept} --vae-dtype float32" in str(caught.value.hint)


def test_what_a_callback_changed_in_an_earlier_run_stays_known() -> None:
    own, made = VideoRecord(0, 1, notes=["before"]), VideoRecord(0, 1, notes=["before", "new"], changed=True)
    own.adopt(made)
    assert own.changed
    assert own.notes == ["before", "new"]
    own.adopt(VideoRecord(0, 1))
    assert own.changed
