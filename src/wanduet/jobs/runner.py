"""The worker's main loop: claim jobs, run each in a thread, do housekeeping, drain on request."""

import ctypes
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import structlog
from sqlalchemy.exc import SQLAlchemyError

from wanduet.errors import WanduetError
from wanduet.jobs.attempt import Attempt
from wanduet.jobs.hooks import EngineHooks, VideoEngine
from wanduet.jobs.housekeeping import Housekeeper
from wanduet.jobs.keeper import AttemptSettings
from wanduet.jobs.leases import WorkerLock
from wanduet.jobs.logs import describe_error
from wanduet.jobs.model_watch import ModelWatch
from wanduet.jobs.records import Lease, ModelId, StaleLeaseError
from wanduet.jobs.store import JobStore
from wanduet.jobs.telemetry import Telemetry
from wanduet.jobs.watchdog import HangSettings, Watchdog

log = structlog.get_logger(__name__)

_MOST_POLLS = 16  # pause between two tries to reach the database


@dataclass(frozen=True, slots=True)
class RunnerSettings:
    """A worker's settings. Times in seconds.

    `parallel`: jobs at once; two or three keep an engine with overlapping stages busy. `max_bytes`: limit of published
    files (None: no limit). `housekeeping`: whether this worker also recovers dead workers' jobs and deletes old files;
    False if another process does. `model_seconds`: how long a job may wait for a model that no worker has before it
    fails.
    """

    lease_seconds: float = 30.0
    parallel: int = 1
    tidy_seconds: float = 60.0
    max_bytes: int | None = None
    housekeeping: bool = True
    model_seconds: float = 60.0
    supervisor: str = ""  # the id of the supervisor's SupervisorLock
    attempt: AttemptSettings = field(default_factory=AttemptSettings)
    hangs: HangSettings = field(default_factory=HangSettings)


class Runner:
    """Runs the store's jobs on an engine until drained. One thread calls `run`, any thread may call `drain`."""

    def __init__(
        self,
        store: JobStore,
        engine: VideoEngine,
        settings: RunnerSettings | None = None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        hooks: EngineHooks | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        """The loop and its jobs report their progress to `watchdog`."""
        self._store = store
        self._engine = engine
        self._settings = settings or RunnerSettings()
        self._hooks = hooks or EngineHooks()
        self._watchdog = watchdog or Watchdog(self._settings.hangs)
        self._housekeeper = Housekeeper(
            store,
            max_crashes=self._settings.attempt.max_crashes,
            tidy_seconds=self._settings.tidy_seconds,
            max_bytes=self._settings.max_bytes,
            monotonic=monotonic,
        )
        self._model_watch = ModelWatch(store, self._settings.model_seconds, monotonic)
        self._served: ModelId | None = None
        self._identified = self._unreadable = False
        self._engine_lost = False
        self._draining = threading.Event()
        self._wake = threading.Condition()
        self._had_room = True
        self._polls = 1  # to wait for, before a database that cannot be reached is tried again
        self._waits_for: str | None = None
        self._attempts: dict[threading.Thread, Lease] = {}
        self._watchdog.give_back = self._give_back
        self.worker: str | None = None  # its name in leases; None before `run`

    def drain(self) -> None:
        """Claim no more jobs; stop running ones at their next step and put them back. `run` then returns."""
        self._draining.set()

    @property
    def draining(self) -> bool:
        """Whether `drain` was called."""
        return self._draining.is_set()

    @property
    def running(self) -> tuple[str, ...]:
        """The ids of the jobs that are running."""
        return tuple(lease.job.id for lease in tuple(self._attempts.values()))

    def run(self) -> None:
        """Claim and run jobs until `drain`. Waits for a database that cannot be reached.

        Raises WanduetError, after its jobs were put back, if a device failed and only a new process can use it.
        """
        lock = WorkerLock(self._store.files.workers, self._settings.supervisor)
        self.worker = lock.worker
        log.info("worker ready", worker=lock.worker)
        telemetry = Telemetry(self._store.files.workers, lock.worker, lambda: self._hooks.measure_memory(self._engine))
        try:
            while not self._draining.is_set():
                self._watchdog.iterated(self._waits_for)
                busy = self._try_iteration(lock.worker)
                telemetry.publish()
                if not busy:
                    self._pause()
            while self._attempts:
                self._watchdog.iterated()
                self._pause()
            if self._engine_lost:
                raise WanduetError("A device failed for good in this process.", hint="Its jobs go on in another one.")
        except BaseException:
            self._draining.set()  # running jobs are put back without counting a crash
            raise
        finally:
            telemetry.close()
            lock.release()
            log.info("worker ended", worker=lock.worker)

    def _try_iteration(self, worker: str) -> bool:
        """As `_iterate`; if the database cannot be reached, wait, longer each time."""
        try:
            busy = self._iterate(worker)
        except SQLAlchemyError as error:
            log.warning("the job store cannot be reached", error=type(error).__name__)
            self._waits_for = "the worker cannot reach the job database, and waits for it"
            self._watchdog.iterated(self._waits_for)
            self._pause(self._polls)
            self._polls = min(2 * self._polls, _MOST_POLLS)
            return False
        self._polls, self._waits_for = 1, None
        return busy

    def _iterate(self, worker: str) -> bool:
        """Run one iteration of the loop; return True if it started a job, so that there may be more."""
        model = self._model()
        if self._settings.housekeeping:
            self._housekeeper.run_once()
            if model is not None:
                self._model_watch.look(model)
        running = tuple(self._attempts.values())
        # A job that crashed before runs alone, so that its next crash is not counted for another job.
        if len(running) >= self._settings.parallel or any(other.job.crashes for other in running):
            return False
        if not self._has_room():
            return False
        if self._draining.is_set():  # checked after `running`, or a job just put back could be claimed
            return False
        lease = self._store.claim(worker, self._settings.lease_seconds, alone=not running, model=model)
        if lease is None:
            return False
        attempt = Attempt(self._store, self._engine, lease, self._draining, self._settings.attempt, self._hooks)
        thread = threading.Thread(
            target=self._run, args=(attempt, lease.job.id), name=f"job-{lease.job.id}", daemon=True
        )
        self._attempts[thread] = lease
        try:
            thread.start()
        except RuntimeError as error:  # no more threads; not the job's fault
            del self._attempts[thread]
            log.error("no job is begun: no thread can be started", error=str(error))
            self._store.release(lease)
            return False
        return True

    def _model(self) -> ModelId | None:
        """Return the model for which jobs are claimed; None for any model.

        None also if the weights cannot be read: each job then fails with that error.
        """
        try:
            if not self._identified:
                self._served = self._hooks.model_of(self._engine)
                self._identified = True
        except (WanduetError, OSError) as error:
            if not self._unreadable:
                log.error("the model cannot be read", **describe_error(error))
            self._unreadable = True
        return self._served

    def _has_room(self) -> bool:
        reserve = self._settings.attempt.reserve_bytes
        room = self._store.files.free_bytes() >= reserve
        if not room and self._had_room:
            log.error("no job is begun: the data folder's disk is full", reserve=reserve)
        self._had_room = room
        return room

    def _run(self, attempt: Attempt, job_id: str) -> None:
        try:
            attempt.run(self._watchdog.add(job_id))
        finally:
            if attempt.engine_lost:
                self._engine_lost = True
                self._draining.set()
            self._watchdog.remove(job_id)
            _give_heap_back()
            with self._wake:
                self._attempts.pop(threading.current_thread(), None)
                self._wake.notify()

    def _give_back(self) -> None:
        """Put all running jobs back into the queue, before the process is ended because of a cancelled one."""
        self._draining.set()
        for lease in tuple(self._attempts.values()):
            with suppress(StaleLeaseError):  # the cancelled one
                self._store.release(lease)

    def _pause(self, polls: int = 1) -> None:
        """Wait for `polls` polls; a finished job ends one of them, `drain` all."""
        for _ in range(polls):
            with self._wake:
                # `drain` takes no lock, as a signal handler may call it; it is noticed within one poll.
                self._wake.wait(self._settings.attempt.poll_seconds)
            if self._draining.is_set():
                return


def _give_heap_back() -> None:
    """Return free memory of glibc's malloc to the system. Otherwise it stays with the process, in gaps that the next job's tensors
    do not fit: with the miniature, 19 to 33 MB for 1,000 jobs."""
    with suppress(OSError, AttributeError, TypeError):  # without glibc
        ctypes.CDLL(None).malloc_trim(0)
