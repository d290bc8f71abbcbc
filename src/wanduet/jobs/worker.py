"""The worker's process: `python -m wanduet.jobs.worker`, started and watched by `jobs.supervisor.WorkerProcess`.

The engine runs here and not in the server, so that its crash only makes a job retry. SIGTERM, or the end of standard
input (the parent process is gone), drains; a second SIGTERM ends the process at once.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Protocol

import structlog
from pydantic import TypeAdapter

from wanduet.config import EngineConfig
from wanduet.errors import WanduetError
from wanduet.folders import never_make
from wanduet.jobs.files import JobFiles
from wanduet.jobs.hooks import VideoEngine
from wanduet.jobs.leases import beat_path
from wanduet.jobs.library_logs import configure_library_logs
from wanduet.jobs.logs import configure_logs, describe_error
from wanduet.jobs.runner import Runner, RunnerSettings
from wanduet.jobs.store import JobStore
from wanduet.jobs.watchdog import Watchdog

log = structlog.get_logger(__name__)

ENGINE = "wanduet.engine.pipeline:Engine"
URL_VARIABLE = "WANDUET_DATABASE_URL"  # not an argument: it may contain a password, and other users can read arguments


class Drains(Protocol):
    """Something that can be drained."""

    @property
    def draining(self) -> bool:
        """Whether `drain` was called."""

    def drain(self) -> None:
        """Finish or put back the work and end; a signal handler may call it."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """A worker process's settings. `engine`: `module:callable` that makes an engine from an EngineConfig."""

    config: EngineConfig
    runner: RunnerSettings = field(default_factory=RunnerSettings)
    retention_seconds: float | None = None
    engine: str = ENGINE

    def to_json(self) -> str:
        """As a command-line argument."""
        return TypeAdapter(WorkerSettings).dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> "WorkerSettings":
        """Parse what `to_json` returned."""
        return TypeAdapter(WorkerSettings).validate_json(text)


def run_worker(settings: WorkerSettings, url: str | None = None) -> None:
    """Run jobs in this process until a signal or the end of standard input drains it."""
    if settings.runner.supervisor:  # the supervisor made the folder
        never_make(settings.config.data_folder)
    files = JobFiles(settings.config.data_folder)
    watchdog = watch_process(settings.runner, files.workers)  # first, as what follows may hang
    store = JobStore(files, url, retention_seconds=settings.retention_seconds)
    engine = make_engine(settings)
    runner = Runner(store, engine, settings.runner, hooks=getattr(engine, "hooks", None), watchdog=watchdog)
    drain_on_signals(runner)
    threading.Thread(target=drain_at_end_of_input, args=(runner,), name="parent-watch", daemon=True).start()
    try:
        runner.run()
    finally:
        with suppress(AttributeError):
            engine.close()  # type: ignore[attr-defined]
        store.close()
        watchdog.stop()


def watch_process(settings: RunnerSettings, workers: Path) -> Watchdog:
    """Start a watchdog for this process, with a heartbeat file if there is a supervisor."""
    beat = beat_path(workers, settings.supervisor) if settings.supervisor else None
    watchdog = Watchdog(settings.hangs, beat)
    watchdog.start()
    return watchdog


def make_engine(settings: WorkerSettings) -> VideoEngine:
    """Make the engine that the settings name, with their configuration."""
    module, _, name = settings.engine.partition(":")
    engine: VideoEngine = getattr(import_module(module), name)(settings.config)
    return engine


def drain_on_signals(runner: Drains) -> None:
    """Make SIGTERM and SIGINT drain; a second signal ends the process at once."""

    def handle(number: int, _: FrameType | None) -> None:
        if runner.draining:
            os._exit(128 + number)  # the leases end with the process; another worker resumes the jobs
        runner.drain()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def drain_at_end_of_input(runner: Drains) -> None:
    """Drain when the parent process is gone."""
    with suppress(OSError, ValueError):
        while os.read(0, 1024):
            pass
    runner.drain()


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of the worker's process; its one argument is `WorkerSettings` as JSON."""
    parser = argparse.ArgumentParser(prog="python -m wanduet.jobs.worker", description=__doc__)
    parser.add_argument("settings", type=WorkerSettings.from_json)
    settings: WorkerSettings = parser.parse_args(arguments).settings
    configure_logs()
    configure_library_logs()
    try:
        run_worker(settings, os.environ.get(URL_VARIABLE))
    except Exception as error:
        # In place of a plain traceback among the log's JSON lines. Messages written for users contain no prompt.
        reason = str(error) if isinstance(error, WanduetError) else None
        log.error("the worker cannot go on", reason=reason, **describe_error(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
