"""Gates: how many may do something at the same moment, all together and each owner."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from wanduet.doors.http.errors import unavailable

BUSY_RETRY_SECONDS = 1


class Gate:
    """Lets so many in at once and refuses the others, with a time to come back.

    `what` is named in the refusal; `share` is how many of the places one owner may take, all of them by default.
    """

    def __init__(self, limit: int, what: str, share: int | None = None) -> None:
        self._limit = limit
        self._what = what
        self._share = share
        self._inside: Counter[str | None] = Counter()
        self._guard = threading.Lock()

    @contextmanager
    def enter(self, owner: str | None = None) -> Iterator[None]:
        """Be inside during the block. Raises ApiError: 429 if the owner's share is taken, 503 if all is."""
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
