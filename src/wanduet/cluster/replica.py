"""A replica: a single machine's worker, run as a Ray actor that owns some GPUs of one node.

Ray only places it, monitors it and delivers drains; jobs come from the database and return to it, under the same leases
and fencing tokens as on one machine. So a replica continues without Ray's head, the controller and the API, and a job's
fate never depends on a message that may be lost.
"""

import ctypes
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from wanduet.cluster.files import open_files
from wanduet.cluster.fit import NOWHERE, Fit, FitOf, Fitter
from wanduet.cluster.loras import NodeLoras
from wanduet.cluster.settings import REPLICA_CONNECTIONS, ReplicaOrder
from wanduet.cluster.shapes import Shape
from wanduet.cluster.store import ClusterStore
from wanduet.folders import never_make
from wanduet.jobs.logs import configure_logs
from wanduet.jobs.runner import Runner
from wanduet.jobs.supervisor import MEMORY_POOLS
from wanduet.jobs.watchdog import Watchdog
from wanduet.jobs.worker import make_engine

M_ARENA_MAX = -8  # from glibc's malloc.h


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """A replica's status. `worker` is the name on its leases; `ended`: it was drained, or gave up; `lacks`: as in
    `ReplicaView`."""

    worker: str | None
    jobs: tuple[str, ...]
    idle_seconds: float
    draining: bool
    ended: bool
    shape: Shape
    node: str | None
    pid: int
    lacks: frozenset[str] = frozenset()


class Replica:
    """The actor's class; its methods may run concurrently."""

    def __init__(self, order: ReplicaOrder, node: Callable[[], str | None] = lambda: None) -> None:
        """Load the engine. Raises errors that prevent its work here."""
        prepare_process(order.shape.cpu_count)
        configure_logs()
        self._order = order
        self._node = node() or order.node
        settings = order.settings
        config = order.shape.engine_config(settings.worker.config)
        worker = replace(settings.worker, config=config, runner=settings.runner())
        self._engine = make_engine(worker)
        self._loras = NodeLoras(config.lora_dir)
        self._store = ClusterStore(
            open_files(config.data_folder, settings.storage),
            order.database_url,
            fit_of=self._fits(order),
            devices=order.shape.gpus,
            patience_seconds=settings.patience_seconds,
            retention_seconds=worker.retention_seconds,
            connections=REPLICA_CONNECTIONS,
        )
        self._store.loras = self._loras
        never_make(config.data_folder)
        hooks = getattr(self._engine, "hooks", None)
        self._watchdog = Watchdog(worker.runner.hangs)  # ends the actor, which Ray reports to the controller
        self._runner = Runner(self._store, self._engine, worker.runner, hooks=hooks, watchdog=self._watchdog)
        self._idle_since: float | None = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="replica", daemon=True)
        self._watchdog.start()
        self._thread.start()

    def status(self) -> ReplicaStatus:
        """Return its status, for the controller."""
        jobs, now = self._runner.running, time.monotonic()
        if jobs:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        idle = 0.0 if self._idle_since is None else now - self._idle_since
        ended = not self._thread.is_alive()
        return ReplicaStatus(
            worker=self._runner.worker,
            jobs=jobs,
            idle_seconds=idle,
            draining=self._runner.draining,
            ended=ended,
            shape=self._order.shape,
            node=self._node,
            pid=os.getpid(),
            lacks=self._loras.lacking,
        )

    def drain(self) -> None:
        """Take no more jobs; checkpoint running ones within a step, and return them to the queue."""
        self._runner.drain()

    def _run(self) -> None:
        try:
            self._runner.run()
        finally:
            with suppress(AttributeError):
                self._engine.close()  # type: ignore[attr-defined]
            self._store.close()
            self._watchdog.stop()

    def _fits(self, order: ReplicaOrder) -> FitOf:
        """Return the engine's plans for the devices of this node, so that it refuses no job that it takes."""
        from wanduet.planning.hardware import detect
        from wanduet.runtime.models import Models

        config = order.settings.worker.config
        fitter = Fitter(Models(order.shape.engine_config(config)).memory, config)
        here = getattr(self._engine, "hardware", None) or detect()
        if not order.shape.declared:
            return lambda demand: fitter.on_hardware(demand, here)
        declared = order.shape.hardware

        def fit(demand: str) -> Fit:
            found = fitter.on_hardware(demand, declared)
            return found if fitter.on_hardware(demand, here).fits else NOWHERE

        return fit


def prepare_process(threads: int) -> None:
    """Set this process's threads and malloc arenas.

    Ray would limit threads to the actor's CPUs, of which it has none. A worker on one machine gets the arena limit from
    its environment.
    """
    with suppress(OSError, AttributeError):  # without glibc there is nothing to limit
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, int(MEMORY_POOLS["MALLOC_ARENA_MAX"]))
    os.environ["OMP_NUM_THREADS"] = str(max(1, threads))
    import torch

    torch.set_num_threads(max(1, threads))
