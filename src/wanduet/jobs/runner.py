"""The worker's loop: claim jobs, run each in a thread, take over from the dead, tidy up, drain when asked."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import structlog
from sqlalchemy.exc import SQLAlchemyError

from wanduet.jobs.attempt import Attempt, AttemptSettings
from wanduet.jobs.hooks import EngineHooks, VideoEngine
from wanduet.jobs.leases import LeaseWatch, WorkerLock
from wanduet.jobs.records import StoredJob
from wanduet.jobs.store import JobStore

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RunnerSettings:
    """How a worker works. Times in seconds.

    `parallel`: jobs at once; an engine with overlapping stages is busy with two or three. `max_bytes`: what
    published files may take of the disk (None: all of it).
    """

    lease_seconds: float = 30.0
    parallel: int = 1
    tidy_seconds: float = 60.0
    max_bytes: int | None = None
    attempt: AttemptSettings = field(default_factory=AttemptSettings)


class Runner:
    """Runs the store's jobs through an engine until drained. One thread calls `run`, any thread `drain`."""

    def __init__(
        self,
        store: JobStore,
        engine: VideoEngine,
        settings: RunnerSettings | None = None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        hooks: EngineHooks | None = None,
    ) -> None:
        self._store = store
        self._engine = engine
        self._settings = settings or RunnerSettings()
        self._hooks = hooks or EngineHooks()
        self._watch = LeaseWatch(store.files.workers, monotonic)
        self._draining = threading.Event()
        self._wake = threading.Condition()
        self._attempts: dict[threading.Thread, StoredJob] = {}
        self._tidied: float | None = None

    def drain(self) -> None:
        """Take no more jobs; end those that run within a step and put them back. `run` then returns."""
        self._draining.set()

    @property
    def draining(self) -> bool:
        """Whether `drain` was called."""
        return self._draining.is_set()

    def run(self) -> None:
        """Work until `drain`. A database that cannot be reached is waited for."""
        lock = WorkerLock(self._store.files.workers)
        log.info("worker ready", worker=lock.worker)
        try:
            while not self._draining.is_set():
                try:
                    busy = self._turn(lock.worker)
                except SQLAlchemyError as error:
                    log.warning("the job store cannot be reached", error=type(error).__name__)
                    busy = False
                if not busy:
                    self._pause()
            for thread in tuple(self._attempts):
                thread.join()
        finally:
            lock.release()
            log.info("worker ended", worker=lock.worker)

    def _turn(self, worker: str) -> bool:
        """Do what there is to do; True if a job was started and there may be more."""
        for pulse in self._watch.look(self._store.pulses()):
            job = self._store.recover(pulse, self._settings.attempt.max_crashes)
            if job is not None:
                log.warning("took a job from a dead worker", job=job.id, worker=pulse.worker, status=job.status)
        self._tidy()
        running = tuple(self._attempts.values())
        # A job that crashed before runs alone, so that a neighbour does not take the blame for its next crash.
        if len(running) >= self._settings.parallel or any(job.crashes for job in running):
            return False
        lease = self._store.claim(worker, self._settings.lease_seconds, alone=not running)
        if lease is None:
            return False
        attempt = Attempt(self._store, self._engine, lease, self._draining, self._settings.attempt, self._hooks)
        thread = threading.Thread(target=self._run, args=(attempt,), name=f"job-{lease.job.id}", daemon=True)
        self._attempts[thread] = lease.job
        thread.start()
        return True

    def _run(self, attempt: Attempt) -> None:
        try:
            attempt.run()
        finally:
            with self._wake:
                self._attempts.pop(threading.current_thread(), None)
                self._wake.notify()

    def _pause(self) -> None:
        """Wait for the next look; a finished job ends the wait."""
        with self._wake:
            # `drain` may come from a signal handler, which must not take a lock: it is seen within one poll.
            self._wake.wait(self._settings.attempt.poll_seconds)

    def _tidy(self) -> None:
        """Retention, now and then. A full or broken disk is no reason to stop working."""
        now = time.monotonic()
        if self._tidied is not None and now - self._tidied < self._settings.tidy_seconds:
            return
        self._tidied = now
        with suppress(OSError):
            self._store.expire()
            if self._settings.max_bytes is not None:
                self._store.trim(self._settings.max_bytes)
            self._store.sweep()
