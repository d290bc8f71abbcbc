"""Work that one process does for all workers: recovering dead workers' jobs, deleting expired and excess files."""

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
    """Maintains one store; several may run at the same time. Call `run_once` a few times in each lease's length.

    `tidy_seconds`: pause between two rounds of retention. `max_bytes`: limit of published files (None: no limit).
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

    def run_once(self, dead: Collection[str] = (), lost: Collection[str] = ()) -> int:
        """Check all leases once; return how many jobs were taken from dead workers.

        `dead`: workers known to have ended. `lost`: workers that ended with their machine, which does not count as a
        crash of their jobs. If one of them still runs, its token is stale and its commits are refused: a wrong report
        repeats work but never harms a result.
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
        """Run a round of retention if one is due. A full or broken disk is logged, not raised.

        If the round was full, the next call runs another one.
        """
        now = time.monotonic()
        if self._tidied is not None and now - self._tidied < self._tidy_seconds:
            return
        try:
            if self._retain():
                return
        except (OSError, OutputError) as error:
            log.warning("retention is put off", error=type(error).__name__)
        except StoreBrokenError as error:  # the damaged page may be one that the queue never reads
            log.error("retention is put off", reason=error.message)
        self._tidied = now

    def _retain(self) -> bool:
        """Run one round; True if another should follow at once."""
        if not self._store.sweeping:
            if self._store.expire() >= ROUND:
                return True
            if self._max_bytes is not None and self._store.trim(self._max_bytes) >= ROUND:
                return True
        self._store.sweep()
        return self._store.sweeping
