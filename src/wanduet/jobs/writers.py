"""Serialises this process's database writers and bounds how long each waits in total."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from wanduet.jobs.records import StoreBusyError

STUCK_SECONDS = 0.5  # a writer that waits longer for another process is stuck
QUEUED_WHILE_STUCK = 16  # behind a stuck writer; more would leave no threads for reads


class WriterQueue:
    """Admits writing threads one by one (`alone`) or all at once, each with a deadline.

    `patience`: seconds that a writer may wait, for other threads and for the database's lock together.
    """

    def __init__(self, patience: float, *, alone: bool) -> None:
        self.patience = patience
        self._alone = alone
        self._lock = threading.Lock()
        self._guard = threading.Lock()
        self._waiting = 0
        self._blocked_since: float | None = None  # since when the admitted thread waits for the database

    @contextmanager
    def entered(self) -> Iterator[float]:
        """Wait to be admitted; yields the deadline of the wait for the database, in monotonic time.

        Raises StoreBusyError.
        """
        until = time.monotonic() + self.patience
        if not self._alone:
            yield until
            return
        if not self._wait(until):
            raise StoreBusyError(f"The job database is locked by another process (waited {self.patience:g} s).")
        try:
            self._blocked_since = time.monotonic()
            yield until
        finally:
            self._blocked_since = None
            self._lock.release()

    def begun(self) -> None:
        """Report that the admitted thread has the database's lock."""
        self._blocked_since = None

    def _wait(self, until: float) -> bool:
        if self._lock.acquire(blocking=False):
            return True
        with self._guard:
            since = self._blocked_since
            stuck = since is not None and time.monotonic() - since > STUCK_SECONDS
            if stuck and self._waiting >= QUEUED_WHILE_STUCK:
                return False
            self._waiting += 1
        try:
            return self._lock.acquire(timeout=max(0.0, until - time.monotonic()))
        finally:
            with self._guard:
                self._waiting -= 1
