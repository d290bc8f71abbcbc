"""What a supervisor says of the worker beside it; starting, dying and hanging are tested in tests/faults."""

from pathlib import Path

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
