"""Records when each stage worked on which job, as spans for Perfetto.

Open the file at https://ui.perfetto.dev (nothing is uploaded), or in chrome://tracing.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanduet.engine.job import Job
from wanduet.media.files import write_atomically

MAX_SPANS = 3000  # about 1,000 jobs


@dataclass(frozen=True, slots=True)
class Span:
    """One stage's work on one job; `begin` and `end` in seconds since the trace began."""

    stage: str
    job: str
    begin: float
    end: float


class Trace:
    """Collects spans from any thread."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._lock = threading.Lock()
        self.spans: list[Span] = []  # the newest only: a service runs for months

    @contextmanager
    def span(self, stage: str, job: Job) -> Iterator[None]:
        """Record the block as a span, also when it fails."""
        begin = time.perf_counter() - self._began
        try:
            yield
        finally:
            span = Span(stage, job.id, begin, time.perf_counter() - self._began)
            with self._lock:
                self.spans.append(span)
                if len(self.spans) >= 2 * MAX_SPANS:
                    del self.spans[:-MAX_SPANS]

    def as_chrome(self) -> dict[str, Any]:
        """Return the trace in Chrome's JSON format: one row per stage, times in microseconds."""
        with self._lock:
            spans = list(self.spans)
        rows = {stage: number for number, stage in enumerate(dict.fromkeys(s.stage for s in spans), start=1)}
        names = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": row, "args": {"name": stage}}
            for stage, row in rows.items()
        ]
        events = [
            {
                "name": f"{s.stage} {s.job[:8]}", "cat": "stage", "ph": "X", "pid": 1, "tid": rows[s.stage],
                "ts": round(1e6 * s.begin), "dur": round(1e6 * (s.end - s.begin)), "args": {"job": s.job},
            }
            for s in spans
        ]  # fmt: skip
        return {"traceEvents": names + events, "displayTimeUnit": "ms"}

    def save(self, path: Path) -> None:
        """Write the trace. Raises OutputError."""
        write_atomically(path, (json.dumps(self.as_chrome()) + "\n").encode())


def overlap(spans: list[Span], first: str, second: str) -> float:
    """Return the seconds in which stage `first` worked on one job while stage `second` worked on another."""
    pairs = ((a, b) for a in spans for b in spans if (a.stage, b.stage) == (first, second) and a.job != b.job)
    return sum(max(0.0, min(a.end, b.end) - max(a.begin, b.begin)) for a, b in pairs)
