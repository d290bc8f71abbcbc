"""Memory of the worker's devices, as the server's metrics show it."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_engine import FakeEngine

from wanduet.config import EngineConfig
from wanduet.jobs.attempt import AttemptSettings
from wanduet.jobs.hooks import device_memory
from wanduet.jobs.leases import WorkerLock
from wanduet.jobs.runner import Runner, RunnerSettings
from wanduet.jobs.store import JobStore
from wanduet.jobs.telemetry import STALE_SECONDS, Telemetry, read_memory

TWO = {"cuda:0": {"allocated": 5, "reserved": 7, "used": 9}, "cuda:1": {"allocated": 1, "reserved": 2, "used": 3}}


def test_what_living_workers_tell_is_summed_by_device(tmp_path: Path) -> None:
    locks = [WorkerLock(tmp_path) for _ in range(3)]
    for lock in locks:
        Telemetry(tmp_path, lock.worker, lambda: TWO).publish()
    host = locks[0].worker.split(".")[0]
    locks[2].release()
    assert read_memory(tmp_path) == {
        (host, "cuda:0", "allocated"): 10, (host, "cuda:0", "reserved"): 14, (host, "cuda:0", "used"): 9,
        (host, "cuda:1", "allocated"): 2, (host, "cuda:1", "reserved"): 4, (host, "cuda:1", "used"): 3,
    }  # fmt: skip
    for damage in ("", "[]", '{"cuda:0": 3}', '{"cuda:0": {"used": null}}'):
        (tmp_path / f"{locks[0].worker}.memory").write_text(damage)
        assert read_memory(tmp_path)[host, "cuda:0", "allocated"] == 5
    Telemetry(tmp_path, locks[1].worker, lambda: TWO).close()
    for lock in locks[:2]:
        lock.release()
    assert read_memory(tmp_path) == {}


def test_a_worker_of_another_machine_is_gone_when_its_file_is_old(tmp_path: Path) -> None:
    Telemetry(tmp_path, "elsewhere.1.a", lambda: TWO).publish()
    assert read_memory(tmp_path)["elsewhere", "cuda:0", "used"] == 9
    then = time.time() - STALE_SECONDS - 1
    os.utime(tmp_path / "elsewhere.1.a.memory", (then, then))
    assert read_memory(tmp_path) == {}


def test_nothing_is_told_where_nothing_is_measured_or_too_soon(tmp_path: Path) -> None:
    asked: list[int] = []
    telemetry = Telemetry(tmp_path, "w", lambda: asked.append(1) or {}, period_seconds=1000.0)
    for _ in range(3):
        telemetry.publish()
    assert (asked, list(tmp_path.iterdir())) == ([1], [])
    Telemetry(tmp_path / "missing", "w", lambda: TWO).publish()


def test_a_runner_tells_while_it_works_and_not_after(store: JobStore) -> None:
    engine = FakeEngine(EngineConfig(data_dir=store.files.folder))
    seen: list[dict[tuple[str, str, str], int]] = []
    settings = RunnerSettings(attempt=AttemptSettings(poll_seconds=0.01))

    def measure(_: FakeEngine) -> dict[str, dict[str, int]]:
        seen.append(read_memory(store.files.workers))
        if len(seen) == 2:
            runner.drain()
        return TWO

    runner = Runner(store, engine, settings, hooks=replace(engine.hooks, measure_memory=measure))
    runner.run()
    assert [len(one) for one in seen] == [0, 6]
    assert read_memory(store.files.workers) == {}


def test_a_machine_without_a_gpu_measures_nothing() -> None:
    if not torch.cuda.is_available():
        assert device_memory(None) == {}


@pytest.mark.gpu
def test_a_gpu_is_measured() -> None:
    kept = torch.empty(2**24, dtype=torch.uint8, device="cuda:0")
    found = device_memory(None)["cuda:0"]
    assert kept.numel() <= found["allocated"] <= found["reserved"] <= found["used"]
