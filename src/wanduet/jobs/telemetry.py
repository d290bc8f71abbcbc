"""What a worker's devices hold while jobs run, told to the server through a small file beside the worker's lock.

The engine lives in the worker's process and the metrics in the server's. A number that is a few seconds old is
good enough for a graph, so it costs no transaction and no sync; nothing breaks where it cannot be written.
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
STALE_SECONDS = 60.0  # an older file's worker is gone, also where its lock cannot be seen from here
DeviceMemory = Mapping[str, Mapping[str, int]]  # bytes by kind ("allocated", "reserved", "used") by device


class Telemetry:
    """Keeps a worker's file fresh; `measure` gives nothing where there is no device of its own memory."""

    def __init__(
        self, folder: Path, worker: str, measure: Callable[[], DeviceMemory], period_seconds: float = PERIOD_SECONDS
    ) -> None:
        self._path = folder / f"{worker}.memory"
        self._measure = measure
        self._period = period_seconds
        self._told: float | None = None

    def tell(self) -> None:
        """Measure and write, unless that was just done."""
        now = time.monotonic()
        if self._told is not None and now - self._told < self._period:
            return
        self._told = now
        if found := self._measure():
            partial = self._path.with_suffix(".memory-new")
            with suppress(OSError):
                partial.write_text(json.dumps(found))
                replace_file(partial, self._path)

    def close(self) -> None:
        """The worker ends: its memory is free."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def read_memory(folder: Path) -> dict[tuple[str, str, str], int]:
    """Bytes by (host, device, kind), summed over the workers that live."""
    found: Counter[tuple[str, str, str]] = Counter()
    for worker, device, kind, size in _entries(folder):
        key = (worker.split(".")[0], device, kind)
        # What is used of a device is the same number whoever asks; the others are each process's own.
        found[key] = max(found[key], size) if kind == "used" else found[key] + size
    return dict(found)


def _entries(folder: Path) -> Iterator[tuple[str, str, str, int]]:
    for path in folder.glob("*.memory"):
        worker = path.name.removesuffix(".memory")
        with suppress(OSError, ValueError, TypeError, AttributeError):
            if is_dead(folder, worker) or time.time() - path.stat().st_mtime > STALE_SECONDS:
                continue
            told: dict[str, dict[str, Any]] = json.loads(path.read_text())
            for device, kinds in told.items():
                for kind, size in kinds.items():
                    yield worker, device, kind, int(size)
