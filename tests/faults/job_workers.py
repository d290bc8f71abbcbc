"""Workers to attack, for tests of the job store: real processes around an engine that only counts steps."""

import os
import random
import sys
import time
from collections.abc import Callable
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.forked import start_method
from wanduet.config import EngineConfig
from wanduet.jobs.attempt import AttemptSettings
from wanduet.jobs.records import NewJob
from wanduet.jobs.runner import RunnerSettings
from wanduet.jobs.store import JobStore
from wanduet.jobs.supervisor import WorkerProcess
from wanduet.jobs.watchdog import HangSettings
from wanduet.jobs.worker import WorkerSettings

FAKE_FOLDER = Path(__file__).parents[1] / "unit" / "jobs"
sys.path.insert(0, str(FAKE_FOLDER))
fake_engine = import_module("fake_engine")
content, journal, open_store = fake_engine.content, fake_engine.journal, fake_engine.open_store

ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(FAKE_FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "FAKE_STEP_SECONDS": "0.01",
}
FOREVER = 10**6  # attempts: where every death is the test's own doing, no job may be blamed


# Far below what a real worker is given; still far above what a busy machine keeps a process waiting. A worker touches its
# beat only once it has imported everything: a test of that limit, or of another that is long here, sets it for itself.
HANGS = HangSettings(
    stopped_seconds=1.0, beat_seconds=60.0, loop_seconds=60.0, step_seconds=3.0, phase_seconds=60.0, look_seconds=0.1
)


def worker_settings(
    data: Path, lease_seconds: float = 30.0, max_crashes: int = FOREVER, hangs: HangSettings | None = None
) -> WorkerSettings:
    attempt = AttemptSettings(poll_seconds=0.02, progress_seconds=0.02, max_crashes=max_crashes)
    runner = RunnerSettings(lease_seconds=lease_seconds, attempt=attempt, hangs=hangs or HangSettings())
    return WorkerSettings(EngineConfig(data_dir=data), runner, engine="fake_engine:FakeEngine")


def supervised(data: Path, max_crashes: int = FOREVER, hangs: HangSettings | None = None) -> WorkerProcess:
    """A worker as the server has it: started again whenever it dies or hangs."""
    settings = worker_settings(data, max_crashes=max_crashes, hangs=hangs)
    return WorkerProcess(settings, fake_engine.postgres_url(data), ENVIRONMENT, pauses=(0.01, 0.1))


def submit(store: JobStore, prompt: str, steps: int = 20, seed: int = 7) -> str:
    request = {"prompt": prompt, "num_inference_steps": steps, "seed": seed}
    return store.submit(NewJob("ann", "m", request)).job.id


def wait(condition: Callable[[], Any], seconds: float = 240.0) -> Any:
    """What the condition gives once it is true. The time is for a machine that is busy with other things."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError("it did not happen in time")


def steps_of(data: Path, job_id: str) -> list[str]:
    return [line for line in journal(data) if line.startswith(f"{job_id} step")]


def published(store: JobStore) -> set[str]:
    return {path.name for path in store.files.videos.iterdir()}


def assert_exactly_once(store: JobStore, ids: list[str]) -> None:
    """Every job completed, each with its right video, and the engine finished none twice.

    A kill may leave files that no row holds. The service sweeps them away now and then, and never serves them.
    """
    store.sweep()
    found = [store.get(job_id) for job_id in ids]
    assert [job.id for job in found if job.status != "completed"] == [], "lost"
    done = [line for line in journal(store.files.folder) if line.endswith(" done")]
    assert len(done) == len(set(done)), "made twice"  # one may be missing: killed between the file and its line
    for number, job in enumerate(found):
        path = store.files.path(job.files[0].name)
        assert path is not None
        assert path.read_bytes() == content(f"job {number}", number)
    assert published(store) == {file.name for job in found for file in job.files}
    assert list(store.files.work.iterdir()) == []


class Workers:
    """Workers that start within milliseconds, forked from a process that has imported everything already."""

    def __init__(
        self, data: Path, failpoints: tuple[str, ...] = (), jumps: float = 0.0, lease_seconds: float = 30.0
    ) -> None:
        self._context: Any = start_method()
        self._ears, self._mouth = self._context.Pipe(duplex=False)
        settings, url = worker_settings(data, lease_seconds).to_json(), fake_engine.postgres_url(data)
        self._arguments = (settings, url, self._ears, str(data / "worker.log"), failpoints, jumps)
        self.living: list[BaseProcess] = []

    def start(self) -> BaseProcess:
        process: BaseProcess = self._context.Process(target=fake_engine.work, args=self._arguments, daemon=True)
        process.start()
        self.living.append(process)
        return process

    def kill_one(self, dice: random.Random) -> None:
        process = self.living.pop(dice.randrange(len(self.living)))
        process.kill()
        process.join()
        process.close()

    def stop(self) -> list[int | None]:
        """Drain them all; their exit codes."""
        for process in self.living:
            process.terminate()
        for process in self.living:
            process.join(240)
        codes = [process.exitcode for process in self.living]
        for process in self.living:
            process.close()
        self.living = []
        self._mouth.close()
        self._ears.close()
        return codes
