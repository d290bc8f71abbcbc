"""Prometheus metrics: the server's own counts, and the store's state at the time of the request."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wanduet.doors.http.keys import LOCAL_OWNER
from wanduet.jobs.records import Statistics
from wanduet.jobs.schema import STEPS
from wanduet.jobs.store import JobStore
from wanduet.jobs.telemetry import read_memory

OWNER = "owner"  # key of a request's state: its owner
STATUSES = ("queued", "in_progress", "completed", "failed")


class WorkerView(Protocol):
    """The state of the worker, as the server shows it: see `jobs.supervisor.WorkerProcess`."""

    restarts: int
    hangs: int

    @property
    def trouble(self) -> str | None:
        """Return why no worker takes jobs now; None if one does."""


class Counts:
    """Counts of the whole server, or of one key."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "wanduet_http_requests",
            "Answers by route and status.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "wanduet_http_request_seconds", "Time to the first byte of an answer.", ["route"], registry=self.registry
        )
        self.submissions = Counter(
            "wanduet_submissions", "Submissions by what became of them.", ["outcome"], registry=self.registry
        )


class ServerMetrics:
    """The metrics of one server; nothing is global, so that several servers fit into one process.

    A key sees its own requests and jobs, and nothing about the machine; an operator sees everything.
    """

    def __init__(self, store: JobStore, worker: WorkerView | None = None) -> None:
        self._store = store
        self._worker = worker
        self._everybody = Counts()
        self._by_owner: defaultdict[str, Counts] = defaultdict(Counts)
        self._guard = threading.Lock()

    def count_submission(self, owner: str, outcome: str) -> None:
        """Count a submission; `outcome` is `stored`, `repeated` or `refused`."""
        for counts in self._of(owner):
            counts.submissions.labels(outcome).inc()

    def count_answer(self, owner: str | None, method: str, route: str, status: int, seconds: float) -> None:
        """Count a response that began after `seconds`; `owner` is the request's key, or None if none was checked."""
        for counts in self._of(owner):
            counts.requests.labels(method, route, status).inc()
            counts.seconds.labels(route).observe(seconds)

    def show(self, owner: str | None) -> bytes:
        """Return an owner's metrics, or all of them (None), in Prometheus's text format."""
        counts = self._of(owner)[-1]
        current = CollectorRegistry()
        current.register(_StoreCollector(self._store, owner))
        if owner is None and self._worker is not None:
            current.register(_WorkerCollector(self._worker))
        return generate_latest(counts.registry) + generate_latest(current)

    def _of(self, owner: str | None) -> tuple[Counts, ...]:
        if owner is None or owner == LOCAL_OWNER:
            return (self._everybody,)
        with self._guard:
            return self._everybody, self._by_owner[owner]


class _StoreCollector(Collector):
    def __init__(self, store: JobStore, owner: str | None) -> None:
        self._store = store
        self._owner = owner

    def describe(self) -> Iterator[Metric]:
        """Yield nothing, so that registering does not read the database."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Read the numbers of jobs from the store."""
        statistics = self._store.statistics(self._owner)
        yield from _jobs(statistics)
        if self._owner is None:
            yield from _stages(statistics)
            yield _device_memory(read_memory(self._store.files.workers))


class _WorkerCollector(Collector):
    def __init__(self, worker: WorkerView) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        """Read the state of the worker."""
        worker = self._worker
        yield CounterMetricFamily("wanduet_worker_hangs", "Workers that hung and were ended.", worker.hangs)
        yield CounterMetricFamily("wanduet_worker_restarts", "Workers that ended and were replaced.", worker.restarts)
        ready = float(worker.trouble is None)
        yield GaugeMetricFamily("wanduet_worker_ready", "1 while some worker takes jobs, else 0.", ready)


def _jobs(statistics: Statistics) -> Iterator[Metric]:
    jobs = GaugeMetricFamily("wanduet_jobs", "Jobs in the store by status.", labels=["status"])
    for status in STATUSES:
        jobs.add_metric([status], statistics.by_status.get(status, 0))
    yield jobs
    failures = GaugeMetricFamily("wanduet_failed_jobs", "Failed jobs in the store by code.", labels=["code"])
    for code, count in sorted(statistics.failures.items()):
        failures.add_metric([code], count)
    yield failures
    yield GaugeMetricFamily(
        "wanduet_queue_oldest_seconds", "How long the oldest queued job waits.", statistics.oldest_wait
    )
    memory = GaugeMetricFamily(
        "wanduet_peak_memory_bytes", "Peak memory of the newest completed job by device.", labels=["device"]
    )
    for device, peak in sorted(statistics.peak_memory_bytes.items()):
        memory.add_metric([device], peak)
    yield memory


def _stages(statistics: Statistics) -> Iterator[Metric]:
    seconds = CounterMetricFamily("wanduet_stage_seconds", "Seconds by stage of all completed jobs.", labels=["stage"])
    counts = CounterMetricFamily("wanduet_stage_jobs", "Completed jobs that went through a stage.", labels=["stage"])
    step_seconds, steps = statistics.stages.get(STEPS, (0.0, 0))
    yield CounterMetricFamily("wanduet_denoise_steps", "Denoising steps of all completed jobs.", steps)
    yield CounterMetricFamily("wanduet_denoise_steps_seconds", "Seconds that these steps took.", step_seconds)
    for stage, (total, count) in sorted(statistics.stages.items()):
        if stage == STEPS:
            continue
        name = stage.removesuffix("_s")
        seconds.add_metric([name], total)
        counts.add_metric([name], count)
    yield from (seconds, counts)


def _device_memory(sizes: Mapping[tuple[str, str, str], int]) -> Metric:
    memory = GaugeMetricFamily(
        "wanduet_device_memory_bytes",
        "Memory of the workers' devices just now: allocated and reserved by the workers, used by everybody.",
        labels=["host", "device", "kind"],
    )
    for labels, size in sorted(sizes.items()):
        memory.add_metric(labels, size)
    return memory


class CountRequests:
    """Counts responses by route pattern instead of path, so that video ids do not create new series."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        known = scope.setdefault("state", {})  # routes record the owner here, also on a copy of the scope

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST", "DELETE") else "other"
                seconds = time.perf_counter() - started
                self._metrics.count_answer(known.get(OWNER), method, route, message["status"], seconds)
            await send(message)

        await self._app(scope, receive, counting_send)
