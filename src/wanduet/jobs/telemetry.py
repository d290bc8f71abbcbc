"""GPU memory of a worker, passed to the server's metrics through a small file beside the worker's lock.

The engine is in the worker's process, the metrics in the server's. Values for a graph may be some seconds old or
missing, so they are written without a transaction and without a sync, and errors are ignored.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from wanduet.folders import replace_file
from wanduet.jobs.leases import is_dead

PERIOD_SECONDS = 2.0
STALE_SECONDS = 60.0  # an older file is ignored: its worker may be on another machine, so that its lock says nothing
DeviceMemory = Mapping[str, Mapping[str, int]]  # bytes by kind ("allocated", "reserved", "used") by device


class Telemetry:
    """Writes a worker's file; `measure` returns an empty mapping if there is no GPU."""

    def __init__(
        self, folder: Path, worker: str, measure: Callable[[], DeviceMemory], period_seconds: float = PERIOD_SECONDS
    ) -> None:
        self._path = folder / f"{worker}.memory"
        self._measure = measure
        self._period = period_seconds
        self._written: float | None = None

    def publish(self) -> None:
        """Measure and write, at most once in `period_seconds`."""
        now = time.monotonic()
        if self._written is not None and now - self._written < self._period:
            return
        self._written = now
        if found := self._measure():
            partial = self._path.with_suffix(".memory-new")
            with suppress(OSError):
                partial.write_text(json.dumps(found))
                replace_file(partial, self._path)

    def close(self) -> None:
        """Remove the file, as the worker's memory is free once it has ended."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def read_memory(folder: Path) -> dict[tuple[str, str, str], int]:
    """Return bytes by (host, device, kind), summed over living workers."""
    found: Counter[tuple[str, str, str]] = Counter()
    for worker, device, kind, size in _entries(folder):
        key = (worker.split(".")[0], device, kind)
        # `used` is of the whole device, so the same in each file; the other kinds are of one process each.
        found[key] = max(found[key], size) if kind == "used" else found[key] + size
    return dict(found)


def _entries(folder: Path) -> Iterator[tuple[str, str, str, int]]:
    for path in folder.glob("*.memory"):
        worker = path.name.removesuffix(".memory")
        with suppress(OSError, ValueError, TypeError, AttributeError):
            if is_dead(folder, worker) or time.time() - path.stat().st_mtime > STALE_SECONDS:
                continue
            memory: dict[str, dict[str, Any]] = json.loads(path.read_text())
            for device, kinds in memory.items():
                for kind, size in kinds.items():
                    yield worker, device, kind, int(size)
