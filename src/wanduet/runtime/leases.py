"""All locks of an engine's models, taken in one order, so that threads cannot deadlock."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

# In the order of locking. Any other name is a device, and comes between VAE and PLACE.
GROUP = "group"  # the processes of strategy `parallel`
VAE = "vae"  # for a decode
PLACE = "place of the VAE"  # while the VAE is loaded or moved
_DEVICE_RANK = 2
_RANKS = {GROUP: 0, VAE: 1, PLACE: 3}


class DeviceLeases:
    """A table of reentrant locks by name. With `take`, a thread locks in the order above and at most one device at a
    time; `if_idle` never waits, and may be called with any locks."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[str, threading.RLock] = {}
        self._thread = threading.local()

    @contextmanager
    def take(self, name: str) -> Iterator[None]:
        """Wait for a lock and keep it for the block. Raises RuntimeError if the order of locking could cause a
        deadlock."""
        mine = self._mine()
        if name not in mine and any(_rank(other) >= _rank(name) for other in mine):
            raise RuntimeError(f"{name!r} must be locked before {', '.join(map(repr, mine))}, not after.")
        with self._lock(name):
            mine.append(name)
            try:
                yield
            finally:
                mine.remove(name)

    @contextmanager
    def if_idle(self, name: str) -> Iterator[bool]:
        """Try to lock without waiting. Yield True if that succeeds, and keep the lock for the block; else yield
        False."""
        lock, mine = self._lock(name), self._mine()
        if not lock.acquire(blocking=False):
            yield False
            return
        mine.append(name)
        try:
            yield True
        finally:
            mine.remove(name)
            lock.release()

    def _mine(self) -> list[str]:
        """The names that this thread has locked."""
        if not hasattr(self._thread, "names"):
            self._thread.names = []
        names: list[str] = self._thread.names
        return names

    def _lock(self, name: str) -> threading.RLock:
        with self._guard:
            return self._locks.setdefault(name, threading.RLock())


def _rank(name: str) -> int:
    return _RANKS.get(name, _DEVICE_RANK)
