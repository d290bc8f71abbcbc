"""A replica: the worker of one machine, as a Ray actor with some GPUs of one node to itself.

Ray places it, watches it and carries drains to it, and nothing else: jobs come from the database and go back to
it, under the leases and fences of one machine. So a replica goes on while Ray's head, the controller and the API
are away, and what happens to a job never depends on a message that may be lost.
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
from wanduet.cluster.handover import DECODER, TakeBack
from wanduet.cluster.settings import REPLICA_CONNECTIONS, ReplicaOrder
from wanduet.cluster.shapes import Shape, declared_devices
from wanduet.cluster.store import ClusterStore
from wanduet.folders import never_make
from wanduet.jobs.logs import configure_logs
from wanduet.jobs.runner import Runner
from wanduet.jobs.supervisor import MEMORY_POOLS
from wanduet.jobs.watchdog import Watchdog
from wanduet.jobs.worker import ENGINE, make_engine

M_ARENA_MAX = -8  # of glibc's malloc.h
ROOMY_HOST = 2**40  # bytes: a decoder's host decides nothing
DECODE_ENGINE = "wanduet.engine.decoder:Decoder"


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """A replica as it sees itself. `worker` is the name on its leases; `ended`: it was drained, or gave up."""

    worker: str | None
    jobs: tuple[str, ...]
    idle_seconds: float
    draining: bool
    ended: bool
    shape: Shape
    node: str | None
    pid: int


class Replica:
    """The actor's class; methods may be called at the same time."""

    def __init__(self, order: ReplicaOrder, node: Callable[[], str | None] = lambda: None) -> None:
        """Load what there is to load. Raises what keeps the engine from working here."""
        prepare_process(order.shape.cpu_count)
        configure_logs()
        self._order = order
        self._node = node() or order.node
        settings = order.settings
        config = order.shape.engine_config(settings.worker.config)
        worker = replace(settings.worker, config=config, runner=settings.runner())
        whole = order.shape.stage == "all"
        if not whole:
            engine = DECODE_ENGINE if worker.engine == ENGINE else worker.engine
            attempt = replace(worker.runner.attempt, gives_back=True)
            worker = replace(worker, engine=engine, runner=replace(worker.runner, attempt=attempt))
        self._engine = make_engine(worker)
        fitter, fit_of = self._fits(order)
        self._store = ClusterStore(
            open_files(config.data_folder, settings.storage),
            order.database_url,
            fit_of=fit_of,
            devices=order.shape.gpus,
            patience_seconds=settings.patience_seconds,
            decoder_fits=_decoder_fits(fitter) if whole else None,
            take_back=TakeBack() if whole else None,
            retention_seconds=worker.retention_seconds,
            connections=REPLICA_CONNECTIONS,
        )
        never_make(config.data_folder)
        hooks = getattr(self._engine, "hooks", None)
        self._watchdog = Watchdog(worker.runner.hangs)  # ends the actor, which Ray tells the controller
        self._runner = Runner(self._store, self._engine, worker.runner, hooks=hooks, watchdog=self._watchdog)
        self._idle_since: float | None = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="replica", daemon=True)
        self._watchdog.start()
        self._thread.start()

    def status(self) -> ReplicaStatus:
        """How it is, for the controller."""
        jobs, now = self._runner.running, time.monotonic()
        if jobs:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        idle = 0.0 if self._idle_since is None else now - self._idle_since
        ended = not self._thread.is_alive()
        return ReplicaStatus(
            self._runner.worker, jobs, idle, self._runner.draining, ended, self._order.shape, self._node, os.getpid()
        )

    def drain(self) -> None:
        """Take no more jobs; checkpoint those that run, within a step, and put them back."""
        self._runner.drain()

    def _run(self) -> None:
        try:
            self._runner.run()
        finally:
            with suppress(AttributeError):
                self._engine.close()  # type: ignore[attr-defined]
            self._store.close()
            self._watchdog.stop()

    def _fits(self, order: ReplicaOrder) -> tuple[Fitter, FitOf]:
        """What the engine's own plan says for the devices that are here, so that it refuses nothing it was given."""
        from wanduet.planning.hardware import detect
        from wanduet.runtime.models import Models

        config = order.settings.worker.config
        fitter = Fitter(Models(order.shape.engine_config(config)).memory, config)
        here, stage = getattr(self._engine, "hardware", None) or detect(), order.shape.stage
        if not order.shape.declared:
            return fitter, lambda demand: fitter.on_hardware(demand, here, stage)
        declared = order.shape.hardware

        def fit(demand: str) -> Fit:
            found = fitter.on_hardware(demand, declared, stage)
            return found if fitter.on_hardware(demand, here, stage).fits else NOWHERE

        return fitter, fit


def prepare_process(threads: int) -> None:
    """Compute with so many threads: Ray would allow the actor's CPUs, of which it has none, not its part of the node.
    And take memory as a worker of one machine does, whose environment says so from the start.
    """
    with suppress(OSError, AttributeError):  # no glibc: nothing to be told
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, int(MEMORY_POOLS["MALLOC_ARENA_MAX"]))
    os.environ["OMP_NUM_THREADS"] = str(max(1, threads))
    import torch

    torch.set_num_threads(max(1, threads))


def _decoder_fits(fitter: Fitter) -> Callable[[str, str], bool]:
    """Whether a decoder of a shape that is known by name takes a demand."""

    def fits(shape: str, demand: str) -> bool:
        devices = declared_devices(shape.removesuffix(DECODER))
        return fitter.on(Shape(devices, ROOMY_HOST, stage="decode"))(demand).fits

    return fits
