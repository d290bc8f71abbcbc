"""The service with an engine that only counts, as a process with sockets: `with server(folder) as running`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from job_workers import ENVIRONMENT, wait

from wanduet.jobs.watchdog import HangSettings

PYTHON_PATH = ENVIRONMENT["PYTHONPATH"]

SERVE = """
import json, sys
from pathlib import Path
from wanduet.config import EngineConfig
from wanduet.doors.http.context import ServerSettings
from wanduet.doors.http.server import serve
from wanduet.jobs.attempt import AttemptSettings
from wanduet.jobs.records import Limits
from wanduet.jobs.runner import RunnerSettings
from wanduet.jobs.worker import WorkerSettings
from wanduet.family.wan21 import WAN_1_3B
from wanduet.jobs.watchdog import HangSettings
data, queue, hangs = Path(sys.argv[1]), int(sys.argv[2]), HangSettings(**json.loads(sys.argv[3]))
config = EngineConfig(data_dir=data)
attempt = AttemptSettings(poll_seconds=0.02, progress_seconds=0.02, max_crashes=10**6)
worker = WorkerSettings(config, RunnerSettings(attempt=attempt, hangs=hangs), engine="fake_engine:FakeEngine")
settings = ServerSettings(port=0, stream_poll_seconds=0.05, queue=Limits(queue, None))
serve(worker, WAN_1_3B, settings, announce=lambda url: print(url, flush=True))
"""


@dataclass
class Server:
    process: "subprocess.Popen[str]"
    http: httpx.Client


@contextmanager
def server(
    data: Path,
    queue: int = 10_000,
    step_seconds: float = 0.01,
    hangs: HangSettings | None = None,
    folder: Path | None = None,
) -> Iterator[Server]:
    """`folder`: where it is started."""
    data.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": PYTHON_PATH, "FAKE_STEP_SECONDS": str(step_seconds)}
    told = json.dumps(asdict(hangs or HangSettings()))
    command = [sys.executable, "-P", "-c", SERVE, str(data), str(queue), told]
    with (
        open(data / "server.log", "ab") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True, cwd=folder
        ) as process,
    ):
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url, "the server ended"
            with httpx.Client(base_url=url, timeout=120.0) as http:
                wait(lambda: process.poll() is not None or http.get("/ready").status_code == 200)
                yield Server(process, http)
        finally:
            process.kill()
