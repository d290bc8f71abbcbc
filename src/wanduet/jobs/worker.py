"""The worker's process: `python -m wanduet.jobs.worker`, started and watched by `WorkerProcess`.

The engine lives here and not in the server, so a crash of it is a retried job. SIGTERM, or the end of
standard input (whoever started it is gone), drains; a second SIGTERM ends at once.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Protocol

import structlog

from wanduet.config import EngineConfig
from wanduet.jobs.attempt import AttemptSettings
from wanduet.jobs.files import JobFiles
from wanduet.jobs.hooks import VideoEngine
from wanduet.jobs.leases import SupervisorLock, live_workers
from wanduet.jobs.logs import configure_logs
from wanduet.jobs.runner import Runner, RunnerSettings
from wanduet.jobs.store import JobStore

log = structlog.get_logger(__name__)

ENGINE = "wanduet.engine.pipeline:Engine"
URL_VARIABLE = "WANDUET_DATABASE_URL"  # not an argument: it may hold a password, and arguments are public
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 30.0  # seconds before a crashed worker is started again
_HEALTHY_SECONDS = 60.0  # after living so long, a crash counts as the first


class Drains(Protocol):
    """What can be told to end its work."""

    @property
    def draining(self) -> bool:
        """Whether it was told."""

    def drain(self) -> None:
        """End soon; may be called from a signal handler."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker process is told. `engine`: `module:callable` that makes an engine from an EngineConfig."""

    config: EngineConfig
    runner: RunnerSettings = field(default_factory=RunnerSettings)
    retention_seconds: float | None = None
    engine: str = ENGINE

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> "WorkerSettings":
        """What `to_json` wrote."""
        values = json.loads(text)
        config = values["config"]
        if config["data_dir"] is not None:
            config["data_dir"] = Path(config["data_dir"])
        attempt = AttemptSettings(**values["runner"].pop("attempt"))
        return cls(
            EngineConfig(**config),
            RunnerSettings(**values["runner"], attempt=attempt),
            values["retention_seconds"],
            values["engine"],
        )


def run_worker(settings: WorkerSettings, url: str | None = None) -> None:
    """Work in this process until drained by a signal or by the end of standard input."""
    store = JobStore(JobFiles(settings.config.data_folder), url, retention_seconds=settings.retention_seconds)
    engine = make_engine(settings)
    runner = Runner(store, engine, settings.runner, hooks=getattr(engine, "hooks", None))
    drain_on_signals(runner)
    threading.Thread(target=drain_at_end_of_input, args=(runner,), name="parent-watch", daemon=True).start()
    try:
        runner.run()
    finally:
        with suppress(AttributeError):
            engine.close()  # type: ignore[attr-defined]
        store.close()


def make_engine(settings: WorkerSettings) -> VideoEngine:
    """The engine that the settings name, with their configuration."""
    module, _, name = settings.engine.partition(":")
    engine: VideoEngine = getattr(import_module(module), name)(settings.config)
    return engine


def drain_on_signals(runner: Drains) -> None:
    """SIGTERM and SIGINT drain; a second one ends the process at once."""

    def handle(number: int, _: FrameType | None) -> None:
        if runner.draining:
            os._exit(128 + number)  # leases die with the process; the next worker goes on
        runner.drain()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def drain_at_end_of_input(runner: Drains) -> None:
    """Drain when whoever started this process is gone."""
    with suppress(OSError, ValueError):
        while os.read(0, 1024):
            pass
    runner.drain()


# glibc would give each thread a pool of its own, up to eight a core, and each job has threads of its own: what is freed
# in one pool does not serve another, and a worker that lives for weeks would hold more and more.
MEMORY_POOLS = {"MALLOC_ARENA_MAX": "1"}


class WorkerProcess:
    """Keeps one worker process running: starts it again when it dies, drains it in the end.

    `pauses`: seconds before the first restart, doubled by each crash that follows, and the longest.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        url: str | None = None,
        environment: Mapping[str, str] | None = None,
        pauses: tuple[float, float] = (_FIRST_PAUSE, _LONGEST_PAUSE),
    ) -> None:
        self._workers = JobFiles(settings.config.data_folder).workers
        self._lock = SupervisorLock(self._workers)
        settings = replace(settings, runner=replace(settings.runner, supervisor=self._lock.id))
        self._arguments = [sys.executable, "-m", *self._command(settings)]
        self._environment = {**MEMORY_POOLS, **os.environ, **(environment or {})} | ({URL_VARIABLE: url} if url else {})
        self._pauses = pauses
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._watch, name="worker-watch", daemon=True)
        self.restarts = 0

    def _command(self, settings: WorkerSettings) -> list[str]:
        """The module that the process runs, and its arguments."""
        return ["wanduet.jobs.worker", settings.to_json()]

    @property
    def pid(self) -> int | None:
        """The process now running, if any."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    @property
    def ready(self) -> bool:
        """Whether some worker of this machine is up and takes jobs."""
        return live_workers(self._workers) > 0

    def start(self) -> None:
        """Start the process and watch it."""
        self._lock.acquire()
        self._thread.start()

    def stop(self, timeout: float = 30.0) -> int | None:
        """Drain the worker, kill it after `timeout` seconds; returns its exit status."""
        self._stopping.set()
        process = self._process
        if process is None or not self._thread.is_alive():
            self._lock.release()
            return None
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
        self._thread.join()
        self._lock.release()
        return process.returncode

    def kill(self) -> None:
        """End the worker at once; its jobs wait in the queue for the next one."""
        self._stopping.set()
        if self._process is not None:
            self._process.kill()

    def _watch(self) -> None:
        first, longest = self._pauses
        pause = first
        while not self._stopping.is_set():
            started = time.monotonic()
            # The pipe is never written: that its other end closes tells the worker that this process is gone.
            # Its own session: Ctrl-C in a terminal is for this process, which then drains the worker.
            with subprocess.Popen(
                self._arguments, stdin=subprocess.PIPE, env=self._environment, start_new_session=True
            ) as process:
                self._process = process
                if self._stopping.is_set():
                    process.terminate()
                process.wait()
            if self._stopping.is_set():
                return
            self.restarts += 1
            healthy = time.monotonic() - started > _HEALTHY_SECONDS
            pause = first if healthy else min(pause * 2, longest)
            log.error("the worker died and is started again", status=process.returncode, pause=pause)
            self._stopping.wait(pause)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of the worker's process; its one argument is `WorkerSettings` as JSON."""
    parser = argparse.ArgumentParser(prog="python -m wanduet.jobs.worker", description=__doc__)
    parser.add_argument("settings", type=WorkerSettings.from_json)
    settings: WorkerSettings = parser.parse_args(arguments).settings
    configure_logs()
    run_worker(settings, os.environ.get(URL_VARIABLE))


if __name__ == "__main__":
    main()
