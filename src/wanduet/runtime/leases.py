"""Who may use what: all locks of an engine's models, taken in one order, so that no two threads wait for each other."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

# In this order; whatever has another name is a device, and comes between VAE and PLACE.
GROUP = "group"  # the processes of strategy `parallel`
VAE = "vae"  # to decode with it
PLACE = "place of the VAE"  # to load or move it, for as long as that takes
_DEVICE_RANK = 2
_RANKS = {GROUP: 0, VAE: 1, PLACE: 3}


class DeviceLeases:
    """A table of reentrant locks by name. A thread takes them in the order above; with two devices it waits for neither."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[str, threading.RLock] = {}
        self._thread = threading.local()

    @contextmanager
    def take(self, name: str) -> Iterator[None]:
        """Wait for it, and have it for the length of the block. Raises RuntimeError where that could wait for ever."""
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
        """Whether no other thread has it; if so, none has for the length of the block. Waits for nothing."""
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
        """What this thread has."""
        if not hasattr(self._thread, "names"):
            self._thread.names = []
        names: list[str] = self._thread.names
        return names

    def _lock(self, name: str) -> threading.RLock:
        with self._guard:
            return self._locks.setdefault(name, threading.RLock())


def _rank(name: str) -> int:
    return _RANKS.get(name, _DEVICE_RANK)
