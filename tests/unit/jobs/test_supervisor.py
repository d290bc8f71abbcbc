"""What a supervisor says of the worker beside it; starting, dying and hanging are tested in tests/faults."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from wanduet.config import EngineConfig
from wanduet.jobs.files import JobFiles
from wanduet.jobs.leases import WorkerLock
from wanduet.jobs.runner import RunnerSettings
from wanduet.jobs.supervisor import WorkerProcess
from wanduet.jobs.worker import WorkerSettings


def test_while_the_disk_is_full_a_worker_that_lives_begins_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = WorkerProcess(WorkerSettings(EngineConfig(data_dir=tmp_path), RunnerSettings()))
    lock = WorkerLock(JobFiles(tmp_path).workers)  # another server's
    try:
        assert process.trouble is None
        monkeypatch.setattr(JobFiles, "free_bytes", lambda _: 2.0**20)
        assert process.trouble == "the data folder's disk is full: no job is begun before 64 MiB of it are free"
    finally:
        lock.release()


DRAINED = 7  # its exit status
STAND_IN = f"""
import os, sys, time
while os.read(0, 1024):  # as the worker does, which drains then
    pass
if sys.argv[1] == "drains":
    sys.exit({DRAINED})
time.sleep(600)
"""


class StandIn(WorkerProcess):
    """Starts a small process in the worker's place."""

    does = "drains"

    def _command(self, settings: WorkerSettings) -> list[str]:
        return ["stand_in_for_a_worker", self.does]


@pytest.mark.parametrize("does", ["drains", "hangs"])
def test_on_windows_the_end_of_its_input_drains_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str
) -> None:
    """There `terminate` is a kill; Ctrl-C reaches all processes of a console's group, so the worker gets its own."""
    (tmp_path / "stand_in_for_a_worker.py").write_text(STAND_IN)
    started: list[dict[str, Any]] = []

    class WindowsPopen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, creationflags: int = 0, **keywords: Any) -> None:
            started.append({"creationflags": creationflags})
            super().__init__(*arguments, **keywords)

        terminate = subprocess.Popen.kill

    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 512, raising=False)
    monkeypatch.setattr(subprocess, "Popen", WindowsPopen)
    monkeypatch.setattr(StandIn, "does", does)
    worker = StandIn(WorkerSettings(EngineConfig(data_dir=tmp_path)), environment={"PYTHONPATH": str(tmp_path)})
    worker.start()
    while worker.pid is None:
        time.sleep(0.01)
    with monkeypatch.context() as windows:
        windows.setattr(sys, "platform", "win32")
        status = worker.stop(timeout=30.0 if does == "drains" else 0.1)
    assert (status == DRAINED) == (does == "drains")
    assert started == [{"creationflags": 512}]
