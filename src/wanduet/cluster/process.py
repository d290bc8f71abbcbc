"""The controller's process: `python -m wanduet.cluster.process`, started and watched by the API's.

Ray ends a process whose cluster is gone. Apart from the API, that costs a restart and no answer.
"""

import argparse
import os
import threading
from collections.abc import Sequence
from dataclasses import replace

from wanduet.cluster.controller import Controller
from wanduet.cluster.files import open_files
from wanduet.cluster.fit import Fitter
from wanduet.cluster.settings import ClusterSettings
from wanduet.cluster.store import ClusterStore
from wanduet.jobs.hooks import identify
from wanduet.jobs.library_logs import configure_library_logs
from wanduet.jobs.logs import configure_logs
from wanduet.jobs.supervisor import WorkerProcess
from wanduet.jobs.worker import (
    URL_VARIABLE,
    WorkerSettings,
    drain_at_end_of_input,
    drain_on_signals,
    watch_process,
)


class ControllerProcess(WorkerProcess):
    """Keeps a controller running beside the API, as `WorkerProcess` does with a worker."""

    def __init__(self, settings: ClusterSettings, store: ClusterStore, url: str) -> None:
        self._settings = settings
        self._store = store
        super().__init__(settings.worker, url)

    def _command(self, settings: WorkerSettings) -> list[str]:
        mine = replace(self._settings, worker=settings)  # `settings` names the process's heartbeat
        return ["wanduet.cluster.process", mine.to_json()]

    @property
    def trouble(self) -> str | None:
        """Why no replica takes whole jobs and none will start; None if one does or will."""
        ready = (one["shape"] for one in self._store.replicas() if one["state"] == "ready")
        if any(" " not in shape for shape in ready):  # shapes of dedicated replicas end with their stage
            return None
        if (own := self._own_trouble(live=self.pid is not None)) is not None:
            return own
        found: str | None = self._store.trouble()
        waits = None if self._settings.scale.minimum == 0 else "no replica is ready yet"
        return found or waits


def run_controller(settings: ClusterSettings, url: str) -> None:
    """Reconcile in this process until a signal or the end of standard input drains it. Raises ConfigError."""
    from wanduet.cluster.ray_fleet import RayFleet
    from wanduet.runtime.models import Models

    config = settings.worker.config
    files = open_files(config.data_folder, settings.storage)
    watchdog = watch_process(settings.worker.runner, files.workers)
    # The supervisor's name must not change the fingerprint of the replicas' settings.
    runner = replace(settings.worker.runner, supervisor="")
    settings = replace(settings, worker=replace(settings.worker, runner=runner))
    store = ClusterStore(files, url, retention_seconds=settings.worker.retention_seconds)
    fleet = RayFleet(settings, url)
    models = Models(config)
    controller = Controller(store, fleet, Fitter(models.memory, config), settings, model=identify(models))
    controller.watchdog = watchdog
    drain_on_signals(controller)  # after Ray has installed its handlers
    threading.Thread(target=drain_at_end_of_input, args=(controller,), name="parent-watch", daemon=True).start()
    threading.Thread(target=controller.run_housekeeping, name="housekeeping", daemon=True).start()
    controller.run()
    store.close()
    watchdog.stop()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the controller's process; its one argument is `ClusterSettings` as JSON."""
    parser = argparse.ArgumentParser(prog="python -m wanduet.cluster.process", description=__doc__)
    parser.add_argument("settings", type=ClusterSettings.from_json)
    settings: ClusterSettings = parser.parse_args(arguments).settings
    configure_logs()
    configure_library_logs()
    run_controller(settings, os.environ[URL_VARIABLE])


if __name__ == "__main__":
    main()
