"""Limits on concurrent operations, in total and for each owner."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from wanduet.doors.http.errors import unavailable

BUSY_RETRY_SECONDS = 1


class Gate:
    """A semaphore that refuses at once instead of blocking, with a Retry-After.

    `limit` is the total. `what` names the operations in the error message. `share` is the limit for one owner; None
    means no limit below the total.
    """

    def __init__(self, limit: int, what: str, share: int | None = None) -> None:
        self._limit = limit
        self._what = what
        self._share = share
        self._inside: Counter[str | None] = Counter()
        self._guard = threading.Lock()

    @contextmanager
    def enter(self, owner: str | None = None) -> Iterator[None]:
        """Take one place during the block.

        Raises ApiError: 429 if the owner's share is used up, 503 if the limit is.
        """
        with self._guard:
            if self._inside.total() >= self._limit:
                raise unavailable("overloaded", f"There are too many {self._what} just now.", BUSY_RETRY_SECONDS)
            if owner is not None and self._share is not None and self._inside[owner] >= self._share:
                text = f"You have too many {self._what} just now."
                raise unavailable("too_many_at_once", text, BUSY_RETRY_SECONDS, 429)
            self._inside[owner] += 1
        try:
            yield
        finally:
            with self._guard:
                self._inside[owner] -= 1
                if not self._inside[owner]:
                    del self._inside[owner]
