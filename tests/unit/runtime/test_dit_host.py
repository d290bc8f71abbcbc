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

from wanduet.errors import WeightsError
from wanduet.runtime import dit_host as module
from wanduet.runtime import vae_host
from wanduet.runtime.context import RunContext
from wanduet.runtime.dit_host import TransformerHost
from wanduet.runtime.gil import SECONDS, SHORT_SWITCHES, ShortSwitches
from wanduet.runtime.leases import DeviceLeases

DENOISER = SimpleNamespace(device=torch.device("cpu"))


REQUEST: Any = SimpleNamespace(
    sampler="unipc", flow_shift=3.0, generated_height=480, generated_width=832, quantize_attention="off"
)
PLAN: Any = SimpleNamespace(transformer=None, vae=None, both_resident=False)


class Recorder(TransformerHost):
    """A host that only writes down what is asked of it."""

    def __init__(self) -> None:
        config = SimpleNamespace(attention="auto", data_folder=Path("nowhere"))
        vae = SimpleNamespace(prepare=lambda *_, may_run: self.seen.append("vae"))
        super().__init__(SimpleNamespace(config=config), None, vae, None)  # type: ignore[arg-type]
        self.seen: list[str] = []
        self.cancelled = False
        self.may_load = threading.Event()
        self.problem: Exception | None = None

    def load(self, plan: Any, context: Any) -> Any:
        self.may_load.wait(60)
        self.seen.append("load")
        if self.problem:
            raise self.problem
        return DENOISER

    def fit_to(self, denoiser: Any, plan: Any, request: Any) -> None:
        self.seen.append(f"fit, turns of {sys.getswitchinterval():.4f} s")
        raise RuntimeError("comes again at the job's turn")

    def start(self, pool: ThreadPoolExecutor) -> Any:
        return self._start(PLAN, REQUEST, RunContext(should_cancel=lambda: self.cancelled))(pool)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    models = Recorder()

    def note(name: str) -> Any:
        return lambda *_: models.seen.append(name)

    monkeypatch.setattr(module, "import_backends", note("import"))
    monkeypatch.setattr(module, "make_sampler", note("sampler"))
    return models


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def test_imports_come_after_the_loading(models: Recorder, pool: ThreadPoolExecutor) -> None:
    before = sys.getswitchinterval()
    fitted = models.start(pool)
    assert models.seen == []
    models.may_load.set()
    assert fitted.result(60) is DENOISER  # though setting it up failed
    pool.shutdown()
    assert models.seen[0] == "load"
    assert set(models.seen[1:]) == {"import", "sampler", f"fit, turns of {SECONDS:.4f} s", "vae"}
    assert models.seen.index("import") < models.seen.index(f"fit, turns of {SECONDS:.4f} s") < models.seen.index("vae")
    assert sys.getswitchinterval() == before


def test_a_failed_loading_is_told_and_the_turns_are_put_back(models: Recorder, pool: ThreadPoolExecutor) -> None:
    before = sys.getswitchinterval()
    models.problem = WeightsError("damaged")
    models.may_load.set()
    with pytest.raises(WeightsError, match="damaged"):
        models.start(pool).result(60)
    pool.shutdown()
    assert "import" not in models.seen
    assert sys.getswitchinterval() == before


def test_a_sampler_that_cannot_be_made_does_not_keep_the_decode_from_being_made_ready(
    models: Recorder, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "make_sampler", lambda *_: 1 / 0)
    models.may_load.set()
    models.start(pool)
    pool.shutdown()
    assert models.seen[-1] == "vae"


def test_a_cancelled_job_does_not_wait_for_libraries_that_are_imported(
    models: Recorder, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def imports(*_: Any) -> None:
        begun.set()
        may_end.wait(60)
        ended.set()

    monkeypatch.setattr(module, "make_sampler", imports)
    models.may_load.set()
    models.start(pool)
    assert begun.wait(60)
    models.cancelled = True
    pool.shutdown()
    assert not ended.is_set()
    may_end.set()
    assert ended.wait(60)


def test_turns_are_short_until_the_last_has_ended() -> None:
    before, turns = sys.getswitchinterval(), ShortSwitches()
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
        SHORT_SWITCHES.begin()
        assert sys.getswitchinterval() == pytest.approx(SECONDS / 5, rel=0.05)
        SHORT_SWITCHES.end()
        assert sys.getswitchinterval() == pytest.approx(SECONDS / 5, rel=0.05)
    finally:
        sys.setswitchinterval(before)


def test_a_program_s_own_setting_of_meanwhile_is_kept() -> None:
    before, turns = sys.getswitchinterval(), ShortSwitches()
    try:
        turns.begin()
        sys.setswitchinterval(0.02)
        turns.end()
        assert sys.getswitchinterval() == pytest.approx(0.02)
    finally:
        sys.setswitchinterval(before)


def test_turns_end_also_where_nothing_could_begin(models: Recorder) -> None:
    before, closed = sys.getswitchinterval(), ThreadPoolExecutor(2)
    closed.shutdown()
    with pytest.raises(RuntimeError):
        models.start(closed)
    assert sys.getswitchinterval() == before


def test_tiles_that_are_remembered_are_compiled_and_none_is_measured_beside_the_denoise(monkeypatch) -> None:
    seen: list[object] = []
    checkpoint: Any = SimpleNamespace(spec=SimpleNamespace(vae=None))
    host = vae_host.VAEHost(checkpoint, DeviceLeases())
    plan: Any = SimpleNamespace(device="cuda:0", dtype="float32", tf32=True, tiling="any")
    monkeypatch.setattr(host, "choose_tiles", lambda *args, may_measure: seen.append((*args, may_measure)))
    monkeypatch.setattr(vae_host, "vae_kernels_to_compile", lambda *_: "kernels")
    monkeypatch.setattr(vae_host, "compile_decode", lambda *_: seen.append("compile"))
    host.prepare(plan, REQUEST, may_run=False)
    assert seen == [(torch.device("cuda", 0), torch.float32, False), "compile"]
