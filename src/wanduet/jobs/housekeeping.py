"""What somebody must do for all workers: take jobs from the dead, keep what is published to its limits."""

import sys
import time
from collections.abc import Callable, Collection

import structlog

from wanduet.errors import OutputError
from wanduet.jobs.leases import LeaseWatch
from wanduet.jobs.records import StoreBrokenError
from wanduet.jobs.retention import ROUND
from wanduet.jobs.store import JobStore

log = structlog.get_logger(__name__)


class Housekeeper:
    """Looks after one store. Several may, at the same time; `turn` is to be called a few times a lease's length.

    `tidy_seconds` lie between two rounds of retention; `max_bytes` is what published files may take (None: all).
    """

    def __init__(
        self,
        store: JobStore,
        *,
        max_crashes: int,
        tidy_seconds: float = 60.0,
        max_bytes: int | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._max_crashes = max_crashes
        self._tidy_seconds = tidy_seconds
        self._max_bytes = max_bytes
        self._watch = LeaseWatch(store.files.workers, monotonic)
        self._tidied: float | None = None

    def turn(self, dead: Collection[str] = (), lost: Collection[str] = ()) -> int:
        """Look once; returns how many jobs were taken from dead workers.

        Workers in `dead` are known to have ended, those in `lost` to have gone with their machine, for which
        their jobs are not blamed. If one lives after all, the fence keeps it from committing, so a wrong report
        costs work and never a result.
        """
        pulses = self._store.pulses()
        quiet = {pulse.job_id for pulse in self._watch.look(pulses)}
        taken = 0
        for pulse in pulses:
            if pulse.job_id not in quiet and pulse.worker not in dead and pulse.worker not in lost:
                continue
            job = self._store.recover(pulse, sys.maxsize if pulse.worker in lost else self._max_crashes)
            if job is not None:
                taken += 1
                log.warning("took a job from a dead worker", job=job.id, worker=pulse.worker, status=job.status)
        self._tidy()
        return taken

    def _tidy(self) -> None:
        """A round of retention, now and then. A full or broken disk is no reason to stop working.

        While rounds are full, the next one comes at the next call: between two, the queue goes on.
        """
        now = time.monotonic()
        if self._tidied is not None and now - self._tidied < self._tidy_seconds:
            return
        try:
            if self._retain():
                return
        except (OSError, OutputError) as error:
            log.warning("retention is put off", error=type(error).__name__)
        except StoreBrokenError as error:  # a damaged page may lie where the queue never looks
            log.error("retention is put off", reason=error.message)
        self._tidied = now

    def _retain(self) -> bool:
        """One round; whether another should follow soon."""
        if not self._store.sweeping:
            if self._store.expire() >= ROUND:
                return True
            if self._max_bytes is not None and self._store.trim(self._max_bytes) >= ROUND:
                return True
        self._store.sweep()
        return self._store.sweeping
