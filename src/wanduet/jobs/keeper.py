"""What goes on beside an attempt: its lease is renewed, its progress stored, and its job stopped when it must end."""

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
from sqlalchemy.exc import SQLAlchemyError

from wanduet.jobs.hooks import RunningJob
from wanduet.jobs.logs import describe_error
from wanduet.jobs.records import Lease, StaleLeaseError
from wanduet.jobs.store import JobStore

if TYPE_CHECKING:  # the engine brings torch, which a process that only looks after jobs does without
    from wanduet.runtime.context import Event

log = structlog.get_logger(__name__)

# Percent of a job at the start and end of each phase, by what they take of a 50-step video.
SPANS = {"verify": (0.0, 0.0), "load": (0.0, 2.0), "encode": (2.0, 5.0), "denoise": (5.0, 90.0), "decode": (90.0, 99.0)}
_BEATS = 5  # renewals in the length of a lease: four may be late before anyone takes the job


@dataclass(frozen=True, slots=True)
class AttemptSettings:
    """Times in seconds. `max_crashes`: attempts in a row that may die at the same place. `reserve_bytes`: while the
    disk has less free, no job is begun, and one that could not write its video waits. `gives_back`: a worker that
    does a part of a job only; what fails there goes back into the queue for one that does all of it.
    """

    poll_seconds: float = 0.25
    progress_seconds: float = 0.5
    drain_seconds: float = 0.0  # how long a draining worker lets a job go on before it stops at the next step
    max_crashes: int = 3
    reserve_bytes: int = 64 * 2**20
    log_prompts: bool = False
    gives_back: bool = False


class LeaseKeeper:
    """Renews a lease and stores progress while an attempt runs; stops the engine's job when it must end."""

    def __init__(self, store: JobStore, lease: Lease, draining: threading.Event, settings: AttemptSettings) -> None:
        self.lost = threading.Event()
        self.draining = draining
        self._store = store
        self._lease = lease
        self._settings = settings
        self.failure: Exception | None = None  # what ended the keeper before its time
        self._running: RunningJob | None = None
        self._stop = threading.Event()
        self._guard = threading.Lock()
        self._must_end = False
        self._thread = threading.Thread(target=self._run, name=f"lease-{lease.job.id}", daemon=True)
        self._position: tuple[float, str, float | None] = (0.0, "", None)  # percent, phase, seconds left

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def watch(self, running: RunningJob) -> None:
        """Take the engine's job, to cancel it when the time comes; at once if it came already."""
        with self._guard:
            self._running = running
            must_end = self._must_end
        if must_end:
            running.cancel()

    def note(self, event: "Event", num_videos: int) -> None:
        """Remember how far the job is; stored at the next look."""
        start, end = SPANS.get(event.phase, (None, None))
        if start is None or end is None:
            return
        part = min(1.0, event.done / event.total) if event.total else 0.0
        percent = start + (end - start) * (event.video + part) / max(num_videos, 1)
        self._position = (min(percent, end), event.phase, event.seconds_left)

    def _run(self) -> None:
        try:
            self._keep()
        except Exception as error:  # nobody would renew the lease, nor notice a cancel: the job must not go on so
            log.error("the lease of a job cannot be kept", job=self._lease.job.id, **describe_error(error))
            self.failure = error
            self._end_job()

    def _keep(self) -> None:
        unreachable = False
        beaten = stored_at = time.monotonic()
        stored = self._position
        drained_since: float | None = None
        while not self._stop.wait(self._settings.poll_seconds):
            now = time.monotonic()
            try:
                position = self._position
                if position != stored and now - stored_at >= self._settings.progress_seconds:
                    self._store.progress(self._lease, *position)
                    stored, stored_at, beaten = position, now, now
                elif now - beaten >= self._lease.seconds / _BEATS:
                    self._store.renew(self._lease)
                    beaten = now
                else:
                    self._store.check(self._lease)
                unreachable = False
            except StaleLeaseError:
                self.lost.set()
                self._end_job()
                return
            except SQLAlchemyError as error:  # the job itself needs no database
                if not unreachable:  # said once, and not at each look
                    log.warning("the job store cannot be reached", job=self._lease.job.id, error=type(error).__name__)
                unreachable = True
            if self.draining.is_set():
                drained_since = now if drained_since is None else drained_since
                if now - drained_since >= self._settings.drain_seconds:
                    self._end_job()

    def _end_job(self) -> None:
        with self._guard:
            first, self._must_end = not self._must_end, True
            running = self._running
        if first and running is not None:
            running.cancel()
