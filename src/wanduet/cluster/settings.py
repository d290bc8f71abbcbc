"""What a cluster is told: by the command line to the controller, by the controller to each replica."""

import hashlib
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter

from wanduet.cluster.autoscaler import ScaleSettings
from wanduet.cluster.scheduler import PATIENCE_SECONDS
from wanduet.cluster.shapes import Shape
from wanduet.jobs.runner import RunnerSettings
from wanduet.jobs.worker import WorkerSettings

POLLS_A_SECOND = 400.0  # of all replicas together: what looking at the queue and at leases may cost the database
REPLICA_CONNECTIONS = 2  # that a replica keeps open to the database


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """How a cluster works. Times in seconds.

    `address`: `auto`, `HOST:PORT` or `ray://HOST:PORT`. `storage`: where checkpoints and videos are kept that other
    nodes must read, as an fsspec address (None: the data folder itself is shared by all nodes). `unfit_seconds`:
    how long a job that fits no node, nor one that went away in the last day, waits for one that it does fit.
    """

    worker: WorkerSettings
    address: str = "auto"
    scale: ScaleSettings = field(default_factory=ScaleSettings)
    storage: str | None = None
    tick_seconds: float = 1.0
    patience_seconds: float = PATIENCE_SECONDS
    unfit_seconds: float = 600.0
    start_seconds: float = 900.0  # for a replica to come up, weights and all
    silent_seconds: float = 300.0  # that a replica which is up may leave its node's and its own questions unanswered

    def to_json(self) -> str:
        """For the command line of the controller's process."""
        return _ADAPTER.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> "ClusterSettings":
        """What `to_json` wrote."""
        return _ADAPTER.validate_json(text)

    @property
    def fingerprint(self) -> str:
        """Of what replicas depend on: those with another are drained and replaced."""
        same = replace(self, scale=ScaleSettings(), address="", tick_seconds=0.0, start_seconds=0.0, silent_seconds=0.0)
        return hashlib.sha256(same.to_json().encode()).hexdigest()[:8]

    def runner(self) -> RunnerSettings:
        """How a replica's worker works: the controller keeps house for all, and polls grow rarer with the fleet."""
        runner = self.worker.runner
        busiest = self.scale.maximum * runner.parallel / POLLS_A_SECOND
        poll = max(runner.attempt.poll_seconds, min(busiest, runner.lease_seconds / 8))
        return replace(runner, housekeeping=False, attempt=replace(runner.attempt, poll_seconds=poll))


_ADAPTER = TypeAdapter(ClusterSettings)


@dataclass(frozen=True, slots=True)
class ReplicaOrder:
    """Everything that a replica's process needs to begin."""

    settings: ClusterSettings
    shape: Shape
    node: str | None
    database_url: str = field(repr=False)  # may hold a password
