"""Settings that the command line passes to the controller, and the controller to each replica."""

import hashlib
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter

from wanduet.cluster.autoscaler import ScaleSettings
from wanduet.cluster.scheduler import PATIENCE_SECONDS
from wanduet.cluster.shapes import Shape
from wanduet.jobs.runner import RunnerSettings
from wanduet.jobs.worker import WorkerSettings

POLLS_A_SECOND = 400.0  # of all replicas together: limits the database's load by polls of queue and leases
REPLICA_CONNECTIONS = 2  # open database connections of a replica


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """Settings of a cluster. Times in seconds.

    `address`: `auto`, `HOST:PORT` or `ray://HOST:PORT`. `storage`: fsspec address for checkpoints and videos that other
    nodes must read (None: all nodes share the data folder). `unfit_seconds`: how long a job waits that fits no node,
    nor one that left within the last day, before it fails.
    """

    worker: WorkerSettings
    address: str = "auto"
    scale: ScaleSettings = field(default_factory=ScaleSettings)
    storage: str | None = None
    tick_seconds: float = 1.0
    patience_seconds: float = PATIENCE_SECONDS
    unfit_seconds: float = 600.0
    start_seconds: float = 900.0  # for a replica to start, including its weights
    silent_seconds: float = 300.0  # how long a started replica may leave status calls unanswered

    def to_json(self) -> str:
        """Return JSON for the command line of the controller's process."""
        return _ADAPTER.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> "ClusterSettings":
        """Parse the output of `to_json`."""
        return _ADAPTER.validate_json(text)

    @property
    def fingerprint(self) -> str:
        """Digest of the settings that replicas depend on: replicas with another one are drained and replaced."""
        same = replace(self, scale=ScaleSettings(), address="", tick_seconds=0.0, start_seconds=0.0, silent_seconds=0.0)
        return hashlib.sha256(same.to_json().encode()).hexdigest()[:8]

    def runner(self) -> RunnerSettings:
        """Return a replica's worker settings: no housekeeping (the controller's), fewer polls in larger fleets."""
        runner = self.worker.runner
        busiest = self.scale.maximum * runner.parallel / POLLS_A_SECOND
        poll = max(runner.attempt.poll_seconds, min(busiest, runner.lease_seconds / 8))
        return replace(runner, housekeeping=False, attempt=replace(runner.attempt, poll_seconds=poll))


_ADAPTER = TypeAdapter(ClusterSettings)


@dataclass(frozen=True, slots=True)
class ReplicaOrder:
    """Everything that a replica's process needs to start."""

    settings: ClusterSettings
    shape: Shape
    node: str | None
    database_url: str = field(repr=False)  # may contain a password
