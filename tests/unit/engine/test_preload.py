"""What is made ready beside the encoding of a text: in which order, and what a failure changes."""

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wanduet.engine import preload as module
from wanduet.engine.preload import preload
from wanduet.errors import WeightsError
from wanduet.runtime.gil import SECONDS, SHORT_TURNS, ShortTurns

DENOISER = SimpleNamespace(device=torch.device("cpu"))


class Recorder:
    """Models that only say what is asked of them."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.config = SimpleNamespace(attention="auto", data_folder=Path("nowhere"))
        self.may_load = threading.Event()
        self.problem: Exception | None = None

    def load_denoiser(self, job: Any) -> Any:
        self.may_load.wait(10)
        self.seen.append("load")
        if self.problem:
            raise self.problem
        return DENOISER

    def fit_to(self, denoiser: Any, job: Any) -> None:
        self.seen.append(f"fit, turns of {sys.getswitchinterval():.4f} s")
        raise RuntimeError("comes again at the job's turn")


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    models = Recorder()

    def note(name: str) -> Any:
        return lambda *_: models.seen.append(name)

    monkeypatch.setattr(module, "import_backends", note("import"))
    monkeypatch.setattr(module, "make_sampler", note("sampler"))
    monkeypatch.setattr(module, "_prepare_vae_kernels", note("vae"))
    return models


@pytest.fixture
def job() -> Any:
    return SimpleNamespace(request=SimpleNamespace(sampler="unipc", flow_shift=3.0), cancelled=False)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def test_imports_come_after_the_loading(models: Recorder, job: Any, pool: ThreadPoolExecutor) -> None:
    before = sys.getswitchinterval()
    fitted = preload(models, job, pool)
    assert models.seen == []
    models.may_load.set()
    assert fitted.result(10) is DENOISER  # though setting it up failed
    pool.shutdown()
    assert models.seen[0] == "load"
    assert set(models.seen[1:]) == {"import", "sampler", f"fit, turns of {SECONDS:.4f} s", "vae"}
    assert models.seen.index("import") < models.seen.index(f"fit, turns of {SECONDS:.4f} s") < models.seen.index("vae")
    assert sys.getswitchinterval() == before


def test_a_failed_loading_is_told_and_the_turns_are_put_back(
    models: Recorder, job: Any, pool: ThreadPoolExecutor
) -> None:
    before = sys.getswitchinterval()
    models.problem = WeightsError("damaged")
    models.may_load.set()
    with pytest.raises(WeightsError, match="damaged"):
        preload(models, job, pool).result(10)
    pool.shutdown()
    assert "import" not in models.seen
    assert sys.getswitchinterval() == before


def test_a_sampler_that_cannot_be_made_does_not_keep_the_decode_from_being_made_ready(
    models: Recorder, job: Any, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "make_sampler", lambda *_: 1 / 0)
    models.may_load.set()
    preload(models, job, pool)
    pool.shutdown()
    assert models.seen[-1] == "vae"


def test_a_cancelled_job_does_not_wait_for_libraries_that_are_imported(
    models: Recorder, job: Any, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def imports(*_: Any) -> None:
        begun.set()
        may_end.wait(30.0)
        ended.set()

    monkeypatch.setattr(module, "make_sampler", imports)
    models.may_load.set()
    preload(models, job, pool)
    assert begun.wait(30.0)
    job.cancelled = True
    pool.shutdown()
    assert not ended.is_set()
    may_end.set()
    assert ended.wait(30.0)


def test_turns_are_short_until_the_last_has_ended() -> None:
    before, turns = sys.getswitchinterval(), ShortTurns()
    turns.begin()
    turns.begin()
    turns.end()
    assert sys.getswitchinterval() == pytest.approx(SECONDS, rel=0.05)
    turns.end()
    assert sys.getswitchinterval() == before


def test_turns_that_are_shorter_already_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(SECONDS / 5)
        SHORT_TURNS.begin()
        assert sys.getswitchinterval() == pytest.approx(SECONDS / 5, rel=0.05)
        SHORT_TURNS.end()
        assert sys.getswitchinterval() == pytest.approx(SECONDS / 5, rel=0.05)
    finally:
        sys.setswitchinterval(before)


def test_a_program_s_own_setting_of_meanwhile_is_kept() -> None:
    before, turns = sys.getswitchinterval(), ShortTurns()
    try:
        turns.begin()
        sys.setswitchinterval(0.02)
        turns.end()
        assert sys.getswitchinterval() == pytest.approx(0.02)
    finally:
        sys.setswitchinterval(before)


def test_turns_end_also_where_nothing_could_begin(models: Recorder, job: Any) -> None:
    before, closed = sys.getswitchinterval(), ThreadPoolExecutor(2)
    closed.shutdown()
    with pytest.raises(RuntimeError):
        preload(models, job, closed)
    assert sys.getswitchinterval() == before


def test_tiles_that_are_remembered_are_compiled_and_none_is_measured_beside_the_denoise(monkeypatch, job) -> None:
    seen: list[object] = []
    plan = SimpleNamespace(vae_device="cuda:0", vae_dtype="float32", tf32=True, decode="in any order", keep_both=False)
    job.plan, job.request.generated_height, job.request.generated_width = plan, 480, 832
    models = SimpleNamespace(
        choose_tiles=lambda *args, may_measure: seen.append((*args, may_measure)),
        spec=SimpleNamespace(vae=None),
    )
    monkeypatch.setattr(module, "vae_kernels_to_compile", lambda *_: "kernels")
    monkeypatch.setattr(module, "compile_decode", lambda *_: seen.append("compile"))
    module._prepare_vae_kernels(models, job)
    assert seen == [(torch.device("cuda", 0), torch.float32, False), "compile"]
