"""One load of a transformer at a time: who waits for it, who gives up, and what is kept of one that failed."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from wanduet.engine.job import Job, OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.errors import CancelledError, OutOfMemoryError, OutputError, WeightsError
from wanduet.planning.hardware import detect
from wanduet.planning.planner import make_plan
from wanduet.request import GenerationRequest
from wanduet.runtime.context import NO_JOB, RunContext
from wanduet.runtime.dit_host import TransformerHost
from wanduet.runtime.leases import GROUP, PLACE, VAE, DeviceLeases
from wanduet.runtime.models import Models
from wanduet.weights.safetensors import TensorFiles

SMALL = {"prompt": "a red circle", "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "seed": 3}


class Loads:
    """Holds up each load of the transformer until it is let go, and may let it fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.problems: list[Exception] = []
        whole = TransformerHost._read

        def load(host: TransformerHost, plan: Any) -> Any:
            self.count += 1
            self.begun.set()
            assert self.go_on.wait(60)
            if self.problems:
                raise self.problems.pop(0)
            return whole(host, plan)

        monkeypatch.setattr(TransformerHost, "_read", load)


@pytest.fixture
def loads(monkeypatch) -> Loads:
    return Loads(monkeypatch)


@pytest.fixture
def own(config, loads) -> Iterator[Engine]:
    """An engine that has loaded nothing yet."""
    with Engine(config) as engine:
        yield engine
        loads.go_on.set()


@pytest.fixture
def begin(own, tmp_path) -> Callable[..., Job]:
    def submit(name: str, **changes: Any) -> Job:
        return own.submit(GenerationRequest(**(SMALL | changes)), OutputOptions(tmp_path / f"{name}.mkv", "ffv1"))

    return submit


def test_a_job_that_fails_leaves_the_load_to_the_next(begin, loads, monkeypatch) -> None:
    with monkeypatch.context() as patch:

        def fail(*_: Any) -> None:
            assert loads.begun.wait(60)
            raise OutputError("The disk is full.")

        patch.setattr("wanduet.engine.generate.encode", fail)
        with pytest.raises(OutputError):
            begin("a").result(60)
    following = begin("b")
    loads.go_on.set()
    following.result(60)
    assert loads.count == 1


def test_a_job_that_is_cancelled_does_not_wait_for_the_load(begin, loads) -> None:
    job = begin("a")
    assert loads.begun.wait(60)
    job.cancel()
    with pytest.raises(CancelledError):
        job.result(60)  # and nothing has let the load go on
    following = begin("b")
    loads.go_on.set()
    following.result(60)
    assert loads.count == 1


def test_a_load_that_failed_is_told_once_and_tried_again_for_the_next(begin, loads) -> None:
    loads.problems = [WeightsError("damaged")]
    loads.go_on.set()
    with pytest.raises(WeightsError):
        begin("a").result(60)
    assert loads.count == 1
    begin("b").result(60)
    assert loads.count == 2


def test_a_failure_that_nobody_waited_for_is_not_the_next_jobs(begin, loads) -> None:
    loads.problems = [WeightsError("damaged")]
    job = begin("a")
    assert loads.begun.wait(60)
    job.cancel()
    with pytest.raises(CancelledError):
        job.result(60)
    loads.go_on.set()
    begin("b", num_frames=9).result(60)
    assert loads.count == 2


@pytest.mark.parametrize("problem", [None, WeightsError("damaged")], ids=["loads", "fails"])
def test_all_who_wait_share_one_load_and_what_it_comes_to(config, loads, tmp_path, problem) -> None:
    models = Models(config)
    request = GenerationRequest(**SMALL).resolve(models.spec)
    plan = make_plan(request, models.memory, config, detect())
    loads.problems = [problem] if problem else []
    with ThreadPoolExecutor(3) as pool:
        waiting: list[Future[Any]] = []
        for number in range(3):
            host, context = models.transformer, RunContext(str(number))
            host.preload(plan, request, context)
            waiting.append(pool.submit(host._loading.wait, host._start(plan, request, context), context))
        assert loads.begun.wait(60)
        loads.go_on.set()
        if problem:
            # One that comes to wait when it is over begins another.
            outcomes = [one.exception(60) for one in waiting]
            assert problem in outcomes
            assert loads.count <= 1 + sum(outcome is None for outcome in outcomes)
        else:
            assert len({id(one.result(60)) for one in waiting}) == 1
            assert loads.count == 1
    models.unload()


def test_memory_that_is_short_for_the_weights_is_a_clear_error_and_the_next_job_works(begin, loads) -> None:
    loads.problems = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.65 GiB")]
    loads.go_on.set()
    with pytest.raises(OutOfMemoryError, match="weights") as refused:
        begin("a").result(60)
    assert refused.value.hint
    begin("b").result(60)


def test_close_while_it_loads_ends_the_load_and_all_jobs(begin, own, loads) -> None:
    jobs = [begin("a"), begin("b")]
    assert loads.begun.wait(60)
    closing = threading.Thread(target=own.close)
    closing.start()
    for job in jobs:
        with pytest.raises(CancelledError):
            job.result(60)
    loads.go_on.set()
    closing.join(60)
    assert not closing.is_alive()
    assert own.models.transformer.loaded is None
    assert loads.count == 1


def test_close_ends_a_load_between_two_tensors(config, tmp_path, monkeypatch) -> None:
    """A large model takes minutes."""
    whole, seen = TensorFiles.iterate, []
    reached, go_on = threading.Event(), threading.Event()

    def slowed(self: TensorFiles, names: Any) -> Iterator[Any]:
        for item in whole(self, names):
            seen.append(item[0])
            if len(seen) == 3:
                reached.set()
                assert go_on.wait(60)
            yield item

    monkeypatch.setattr(TensorFiles, "iterate", slowed)
    monkeypatch.setattr("wanduet.engine.generate.encode", lambda *_: go_on.wait(60))
    engine = Engine(config)
    job = engine.submit(GenerationRequest(**SMALL), OutputOptions(tmp_path / "a.mkv", "ffv1"))
    assert reached.wait(60)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine.models.transformer._loading.stopped.is_set():
        closing.join(0.01)
    go_on.set()
    closing.join(60)
    assert not closing.is_alive()
    assert len(seen) == 3
    with pytest.raises(CancelledError):
        job.result(60)


def test_a_load_for_another_precision_is_replaced(config, tmp_path) -> None:
    models = Models(config)
    request = GenerationRequest(**SMALL).resolve(models.spec)
    plan = make_plan(request, models.memory, config, detect())
    other = replace(plan, transformer=replace(plan.transformer, dtype="bfloat16"))
    models.transformer.preload(other, request, RunContext("a"))
    with models.transformer.use(plan, request, RunContext("b")) as denoiser:
        assert denoiser.dtype == torch.float32
    models.unload()


# DeviceLeases.


def test_locks_are_taken_in_one_order() -> None:
    locks = DeviceLeases()
    with locks.take(GROUP), locks.take(VAE), locks.take("cuda:0"), locks.take(PLACE), locks.take("cuda:0"):
        pass
    for first, second in (("cuda:0", VAE), ("cuda:0", "cuda:1"), (VAE, GROUP), (PLACE, "cpu")):
        with locks.take(first), pytest.raises(RuntimeError, match="before"), locks.take(second):
            pass
    with locks.take("cuda:0"), locks.if_idle("cuda:1") as idle:  # which waits for nothing
        assert idle


def test_a_vae_that_is_somewhere_else_is_not_moved_off_its_device(config, tmp_path) -> None:
    """Somebody may be decoding there: this thread has locked another device."""
    models = Models(config)
    request = GenerationRequest(**SMALL).resolve(models.spec)
    plan = replace(make_plan(request, models.memory, config, detect()), both_resident=True)
    with models.decoder(plan, "cpu", NO_JOB) as vae:
        before = [p.data_ptr() for p in vae.decoder.parameters()]
        done = threading.Thread(target=lambda: models.vae.evict(torch.device("meta")))
        done.start()
        done.join(60)
        assert not done.is_alive()  # it does not wait for the decode either
        assert [p.data_ptr() for p in vae.decoder.parameters()] == before


def test_two_decodes_do_not_move_the_vae_from_under_each_other(config, tmp_path) -> None:
    models = Models(config)
    request = GenerationRequest(**SMALL).resolve(models.spec)
    plan = make_plan(request, models.memory, config, detect())
    seen: list[str] = []

    def decode() -> None:
        with models.decoder(plan, "meta", NO_JOB):
            seen.append("second")

    with models.decoder(plan, "cpu", NO_JOB) as vae:
        other = threading.Thread(target=decode)
        other.start()
        other.join(0.05)
        seen.append("first")
        assert vae.post_quant_conv.weight.device.type == "cpu"
    other.join(60)
    assert seen == ["first", "second"]
