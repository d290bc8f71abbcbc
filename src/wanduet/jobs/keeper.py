"""A thread beside an attempt: renews its lease, stores its progress, cancels its job when the lease is lost."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
from sqlalchemy.exc import SQLAlchemyError

from wanduet.jobs.hooks import RunningJob
from wanduet.jobs.logs import describe_error
from wanduet.jobs.records import Lease, StaleLeaseError
from wanduet.jobs.store import JobStore

if TYPE_CHECKING:  # the engine imports torch, which a process that only manages jobs does not load
    from wanduet.runtime.context import Event

log = structlog.get_logger(__name__)

# Progress in percent at the start and end of each phase, by the phases' shares of a 50-step video.
SPANS = {
    "verify": (0.0, 0.0),
    "load": (0.0, 2.0),
    "encode": (2.0, 5.0),
    "encode_video": (5.0, 5.0),
    "denoise": (5.0, 90.0),
    "decode": (90.0, 99.0),
}
_BEATS = 5  # renewals in a lease's length: four may fail before another worker takes the job


@dataclass(frozen=True, slots=True)
class AttemptSettings:
    """Times in seconds.

    `max_crashes`: consecutive crashes at the same progress after which a job fails. `reserve_bytes`: while the disk has
    less free space, no job is started, and one that could not write its video waits.
    """

    poll_seconds: float = 0.25
    progress_seconds: float = 0.5
    drain_seconds: float = 0.0  # how long a draining worker lets a job run before it cancels it
    max_crashes: int = 3
    reserve_bytes: int = 64 * 2**20
    log_prompts: bool = False


class LeaseKeeper:
    """Renews a lease and stores progress while an attempt runs; cancels the engine's job when it must end."""

    def __init__(self, store: JobStore, lease: Lease, draining: threading.Event, settings: AttemptSettings) -> None:
        self.lost = threading.Event()
        self.draining = draining
        self._store = store
        self._lease = lease
        self._settings = settings
        self.on_lost: Callable[[], None] = lambda: (
            None
        )  # called when the engine's job must end because the lease is lost
        self.failure: Exception | None = None  # the error that ended the thread early
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
        """Set the engine's job to cancel when it must end; cancels it now if that is already so."""
        with self._guard:
            self._running = running
            must_end = self._must_end
        if must_end:
            running.cancel()

    def note(self, event: "Event", num_videos: int) -> None:
        """Set the job's progress from an event; the thread stores it at its next poll."""
        start, end = SPANS.get(event.phase, (None, None))
        if start is None or end is None:
            return
        part = min(1.0, event.done / event.total) if event.total else 0.0
        percent = start + (end - start) * (event.video + part) / max(num_videos, 1)
        self._position = (min(percent, end), event.phase, event.seconds_left)

    def _run(self) -> None:
        try:
            self._keep()
        except Exception as error:  # without a thread that renews the lease and notices a cancel, the job must stop
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
                self.on_lost()
                self._end_job()
                return
            except SQLAlchemyError as error:  # the job goes on without the database
                if not unreachable:  # log once, not at each poll
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
