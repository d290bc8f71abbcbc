"""What is left of an engine that was closed: nothing, whatever its jobs came to and whoever still holds them."""

import gc
import os
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from wanduet.accelerate.host_memory import HostMemory
from wanduet.config import EngineConfig
from wanduet.engine import generate
from wanduet.engine.job import Job, OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.errors import CancelledError, NonFiniteLatentsError, WeightsError
from wanduet.models.vae.model import WanVAE
from wanduet.planning.hardware import detect
from wanduet.planning.planner import make_plan
from wanduet.request import GenerationRequest
from wanduet.runtime.context import NO_JOB
from wanduet.runtime.models import Models
from wanduet.runtime.release import forget_traceback
from wanduet.stages.denoise import _Denoise
from wanduet.stages.fallback import DenoiseFallback
from wanduet.stages.predict import TransformerPredictor

REQUEST = {"prompt": "a red circle", "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "seed": 5}
STRATEGIES = {
    "single": {"strategy": "single", "devices": "cpu"},
    "placed": {"devices": "vae=cpu,transformer=cpu"},
    "parallel": {"strategy": "parallel", "devices": "cpu,cpu"},
}


@pytest.fixture(scope="module", autouse=True)
def _forked() -> None:
    """Ranks start as everywhere but in tests: no process may be left."""


@pytest.fixture(autouse=True)
def _python_collects_nothing() -> Iterator[None]:
    """Its own collection may come at any time, or in an hour."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def single(config) -> EngineConfig:
    return replace(config, **STRATEGIES["single"])


def begin(engine: Engine, path: Path, on_step=None, **changes: Any) -> Job:
    return engine.submit(GenerationRequest(**(REQUEST | changes)), OutputOptions(path, "ffv1"), on_step)


class Followed:
    """Weak references to what an engine has loaded, taken while it runs."""

    def __init__(self, engine: Engine) -> None:
        models = engine.models
        parts = [
            models,
            models.vae.loaded,
            models.transformer.loaded and models.transformer.loaded.transformer,
            models.prompts._current and models.prompts._current[1],
        ]
        tensors = [p for part in parts if isinstance(part, torch.nn.Module) for p in part.parameters()]
        self.refs = [weakref.ref(one) for one in (*parts, *tensors) if one is not None]
        self.pids = [p.pid for p in models._group._ranks._processes] if models._group is not None else []

    def left(self) -> list[Any]:
        return [one for ref in self.refs if (one := ref()) is not None]


def assert_nothing_left(followed: Followed) -> None:
    assert followed.refs
    assert not followed.left()
    for pid in followed.pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("wanduet")]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_is_left_of_any_strategy(config, tmp_path, strategy) -> None:
    engine = Engine(replace(config, **STRATEGIES[strategy]))
    job = begin(engine, tmp_path / "a.mkv")
    job.result(120)
    followed = Followed(engine)
    assert len(followed.refs) > 50 or strategy == "parallel"
    assert bool(followed.pids) == (strategy == "parallel")
    engine.close()
    del engine
    assert_nothing_left(followed)
    assert job.result().videos[0].path.exists()  # its owner keeps it


def test_a_stage_that_could_not_be_started_is_started_by_the_next_job(single, tmp_path, monkeypatch) -> None:
    start, errors = threading.Thread.start, [RuntimeError("can't start new thread")] * 2

    def fail_first(self: threading.Thread) -> None:
        if self.name == "wanduet-denoise" and errors:
            raise errors.pop()
        start(self)

    monkeypatch.setattr(threading.Thread, "start", fail_first)
    with Engine(single) as engine, pytest.raises(RuntimeError, match="new thread"):
        begin(engine, tmp_path / "a.mkv")  # and it can be closed
    with Engine(single) as engine:
        with pytest.raises(RuntimeError, match="new thread"):
            begin(engine, tmp_path / "a.mkv")
        assert begin(engine, tmp_path / "a.mkv").result(60).videos


def fail_in_decode(monkeypatch) -> None:
    def broken(self, z, past):
        kept = [self, z]  # as a frame with tensors
        raise RuntimeError(f"a fault with {len(kept)}")

    monkeypatch.setattr(WanVAE, "decode_mid", broken)


def fail_with_a_cause(monkeypatch) -> None:
    whole = TransformerPredictor.__call__

    def broken(self, latents, *rest):
        try:
            whole(self, latents * float("nan"), *rest)
            raise ValueError("inner")
        except ValueError as error:
            raise NonFiniteLatentsError(0) from error

    monkeypatch.setattr(TransformerPredictor, "__call__", broken)


@pytest.mark.parametrize("fail", [fail_in_decode, fail_with_a_cause])
def test_nothing_is_left_after_a_failed_job_whose_error_is_kept(single, tmp_path, monkeypatch, caplog, fail) -> None:
    engine = Engine(single)
    begin(engine, tmp_path / "before.mkv").result(60)
    fail(monkeypatch)
    job = begin(engine, tmp_path / "a.mkv")
    with pytest.raises((RuntimeError, NonFiniteLatentsError)) as raised:
        job.result(60)
    followed = Followed(engine)
    engine.close()
    del engine
    assert_nothing_left(followed)
    assert job.finished
    assert ("in broken" in caplog.text) == isinstance(raised.value, RuntimeError)  # where the unexpected has happened
    assert all(record.exc_info is None for record in caplog.records)


def test_nothing_is_left_after_a_cancelled_job(single, tmp_path) -> None:
    engine = Engine(single)
    job = begin(engine, tmp_path / "a.mkv", on_step=lambda info: job.cancel() if info.step == 1 else None)
    with pytest.raises(CancelledError):
        job.result(60)
    followed = Followed(engine)
    engine.close()
    del engine
    assert_nothing_left(followed)


def test_memory_goes_even_where_somebody_holds_the_model(single, tmp_path) -> None:
    engine = Engine(single)
    begin(engine, tmp_path / "a.mkv").result(60)
    transformer, vae = engine.models.transformer.loaded.transformer, engine.models.vae.loaded
    engine.close()
    assert (
        sum(p.untyped_storage().nbytes() for p in (*transformer.parameters(), *vae.parameters()) if not p.is_meta) == 0
    )


def test_a_denoise_leaves_no_circle_of_references(single, tmp_path, monkeypatch) -> None:
    """Python would collect one when it has counted enough objects, whatever gigabytes hang on it."""
    seen: list[weakref.ref[Any]] = []
    for kind in (_Denoise, DenoiseFallback):
        whole = kind.__call__
        monkeypatch.setattr(kind, "__call__", lambda self, *a, _w=whole: seen.append(weakref.ref(self)) or _w(self, *a))
    with Engine(single) as engine:
        begin(engine, tmp_path / "a.mkv").result(60)
        assert len(seen) > 2
        assert not [ref() for ref in seen if ref() is not None]


def test_an_idle_stage_holds_on_to_nothing_of_the_job_before(single, tmp_path) -> None:
    with Engine(single) as engine:
        job = begin(engine, tmp_path / "a.mkv")
        job.result(60)
        ref = weakref.ref(job)
        del job
        begin(engine, tmp_path / "b.mkv").result(60)  # each stage has put the first one away by now
        gc.collect()  # a job and its videos refer to each other
        assert ref() is None


def test_a_transformer_of_another_precision_takes_the_place_of_the_one_before(single, tmp_path) -> None:
    models = Models(single)
    request = GenerationRequest(**REQUEST).resolve(models.spec)
    plan = make_plan(request, models.memory, single, detect())
    first, second = (
        replace(plan, transformer=replace(plan.transformer, dtype=dtype)) for dtype in ("float32", "bfloat16")
    )
    with models.transformer.use(first, request, NO_JOB) as denoiser:
        parameters = [weakref.ref(p) for p in denoiser.transformer.parameters()]
    del denoiser
    left_when_loaded: list[int] = []
    load = models.transformer._read

    def noted(plan: Any) -> Any:
        left_when_loaded.append(sum(ref() is not None for ref in parameters))
        return load(plan)

    models.transformer._read = noted  # type: ignore[method-assign]
    with models.transformer.use(second, request, NO_JOB) as denoiser:
        assert denoiser.dtype == torch.bfloat16
    del denoiser
    assert left_when_loaded == [0]
    models.unload()


def test_a_failed_load_leaves_nothing(single, tmp_path, monkeypatch) -> None:
    made: list[weakref.ref[Any]] = []

    def damaged(transformer: Any, *_: Any) -> None:
        made.append(weakref.ref(transformer))
        raise WeightsError("The transformer's self-test failed.")

    monkeypatch.setattr("wanduet.runtime.selftest.check_transformer", damaged)
    with Engine(single) as engine:
        job = begin(engine, tmp_path / "a.mkv")
        with pytest.raises(WeightsError):
            job.result(60)
        gc.collect()
        assert [ref() for ref in made] == [None]


def test_host_memory_that_is_closed_unlocks_its_pages(monkeypatch) -> None:
    unlocked: list[int] = []
    monkeypatch.setattr(
        "wanduet.accelerate.host_memory._unlock", lambda flats: unlocked.append(len(flats)) or flats.clear()
    )
    memory = HostMemory("pinned")
    memory._locked += [torch.empty(4), torch.empty(4)]
    memory.copies[0] = torch.empty(4)
    memory.close()
    assert unlocked == [2]
    assert not memory.copies


def test_frames_of_an_error_and_its_causes_are_emptied() -> None:
    refs: list[weakref.ref[Any]] = []

    def holds(reason: str) -> None:
        tensor = torch.zeros(3)
        refs.append(weakref.ref(tensor))
        raise KeyError(reason)

    def chained() -> None:
        try:
            holds("inner")
        except KeyError:
            holds("outer")

    try:
        chained()
    except KeyError as error:
        kept = ExceptionGroup("both", [error])
    assert all(ref() is not None for ref in refs)
    forget_traceback(kept)
    assert [ref() for ref in refs] == [None, None]


# Closing while something else happens.


def test_a_job_submitted_while_the_engine_closes_ends(single, tmp_path) -> None:
    """At whatever moment it comes: it is refused, or cancelled, and nobody waits for ever."""
    engine = Engine(single)
    begin(engine, tmp_path / "a.mkv").result(60)
    stop, ends = threading.Event(), []

    def keep_submitting(number: int) -> None:
        for count in range(1000):
            try:
                job = begin(engine, tmp_path / f"{number}-{count}.mkv")
                job.result(60)
            except CancelledError as error:
                ends.append(str(error))
                if stop.is_set():
                    return

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(keep_submitting, number) for number in range(3)]
        stop.set()
        engine.close()
        for one in running:
            one.result(60)
    assert len(ends) >= 3
    with pytest.raises(CancelledError, match="closed"):
        begin(engine, tmp_path / "late.mkv")


STAGES = {
    "load": ("wanduet.runtime.dit_host.TransformerHost", "_read"),
    "encode": ("wanduet.models.text.umt5.TextEncoder", "encode"),
    "denoise": ("wanduet.models.dit.model.WanTransformer", "forward_cfg"),
    "decode": ("wanduet.models.vae.model.WanVAE", "decode_rows"),
    "write": ("wanduet.media.video.VideoWriter", "write"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_close_in_each_stage_ends_what_runs_and_what_waits(single, tmp_path, monkeypatch, stage) -> None:
    place, name = STAGES[stage]
    reached, go_on = threading.Event(), threading.Event()
    owner = pytest.importorskip(place.rpartition(".")[0])
    kind = getattr(owner, place.rpartition(".")[2])
    whole = getattr(kind, name)

    def slowed(self, *args, **keywords):
        reached.set()
        assert go_on.wait(60)
        return whole(self, *args, **keywords)

    monkeypatch.setattr(kind, name, slowed)
    engine = Engine(replace(single, cache_embeddings=False))
    jobs = [begin(engine, tmp_path / f"{number}.mkv", num_inference_steps=20) for number in range(4)]
    assert reached.wait(60)
    closing = threading.Thread(target=engine.close)
    closing.start()
    for job in jobs:
        while not job.cancelled:
            closing.join(0.01)
    go_on.set()
    for job in jobs:
        with pytest.raises(CancelledError):
            job.result(60)
    closing.join(60)
    assert not closing.is_alive()
    assert not list(tmp_path.glob("*.mkv"))
    assert engine.models.transformer.loaded is None


def test_close_twice_waits_for_the_first(single, tmp_path, monkeypatch) -> None:
    engine = Engine(single)
    begin(engine, tmp_path / "a.mkv").result(60)
    unload, inside, may_end = engine.models.unload, threading.Event(), threading.Event()

    def slow() -> None:
        inside.set()
        assert may_end.wait(60)
        unload()

    monkeypatch.setattr(engine.models, "unload", slow)
    first, second = threading.Thread(target=engine.close), threading.Thread(target=engine.close)
    first.start()
    assert inside.wait(60)
    second.start()
    second.join(0.05)
    assert second.is_alive()
    may_end.set()
    first.join(60)
    second.join(60)
    assert engine.models.transformer.loaded is None


def test_a_callback_cannot_close_its_own_engine(single, tmp_path) -> None:
    with Engine(single) as engine:
        job = begin(engine, tmp_path / "a.mkv", on_step=lambda _: engine.close())
        with pytest.raises(RuntimeError, match="cancel"):
            job.result(60)
        begin(engine, tmp_path / "b.mkv").result(60)


def test_a_device_that_fails_at_every_call_does_not_stop_a_close(single, tmp_path, monkeypatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engine = Engine(single)
    begin(engine, tmp_path / "a.mkv").result(60)
    monkeypatch.setattr("wanduet.runtime.loaded.LoadedTransformer.free", fails)
    monkeypatch.setattr("wanduet.runtime.models.release_models", fails)
    engine.close()
    assert engine.models.transformer.loaded is None
    assert engine.models.vae.loaded is None


def test_a_device_that_fails_at_every_call_does_not_stop_a_stage(single, tmp_path, monkeypatch) -> None:
    def fails() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with Engine(single) as engine:
        with monkeypatch.context() as patch:
            patch.setattr("wanduet.engine.pipeline.release_memory", fails)
            patch.setattr(generate, "encode", lambda *_: 1 / 0)
            for number in range(2):
                with pytest.raises(ZeroDivisionError):
                    begin(engine, tmp_path / f"{number}.mkv").result(60)
        begin(engine, tmp_path / "c.mkv").result(60)
