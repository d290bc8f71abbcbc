"""The controller: compares queued jobs with live replicas, and starts and drains replicas until they match.

It is one process beside the API. It can rebuild its whole state from the database and from Ray, so it may be killed at
any moment; replicas continue without it. Of several controllers on one database one works, the others wait.
"""

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import SQLAlchemyError

from wanduet.cluster.autoscaler import Changes, Start, decide
from wanduet.cluster.fit import Fitter
from wanduet.cluster.loras import MissingLoras, explain_missing
from wanduet.cluster.scheduler import Waiting
from wanduet.cluster.settings import ClusterSettings
from wanduet.cluster.shapes import Gone, Node, ReplicaView
from wanduet.cluster.store import ClusterStore
from wanduet.cluster.trouble import find_trouble
from wanduet.jobs.housekeeping import Housekeeper
from wanduet.jobs.logs import describe_error
from wanduet.jobs.model_watch import ModelWatch
from wanduet.jobs.records import JobError, LoraLostError, ModelId, demand_of, loras_tag
from wanduet.jobs.watchdog import Watchdog

log = structlog.get_logger(__name__)

LEADER_LOCK = 7762  # key of a PostgreSQL advisory lock
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 300.0  # seconds that a node is paused after a replica failed to start on it
REMEMBER_SECONDS = 86400.0  # a node that left longer ago is not expected back
DRAIN_SECONDS = 20.0  # deadline for replicas to end when the service stops


class Fleet(Protocol):
    """Starts and ends replicas."""

    def nodes(self, drained: frozenset[str]) -> tuple[Node, ...]:
        """Return the live nodes; `drained` are names, addresses or id prefixes of nodes to mark as draining."""

    def start(self, start: Start) -> None:
        """Start a replica; `poll` includes it from now on."""

    def drain(self, replica: str) -> None:
        """Drain a replica; its jobs return to the queue."""

    def poll(self) -> tuple[tuple[ReplicaView, ...], tuple[Gone, ...]]:
        """Return the replicas, and those that ended since the last call."""

    def close(self) -> None:
        """Disconnect; the replicas continue."""


class Leadership:
    """A lock that at most one controller on a database owns; it is lost with the owner's connection.

    It is an advisory lock of a transaction that stays open: behind a connection pooler, only a transaction ties a
    connection to its client.
    """

    def __init__(self, database: sa.Engine) -> None:
        self._database = database
        self._connection: sa.Connection | None = None

    def acquire(self) -> bool:
        """Acquire the lock, or check that it is still owned; always True on SQLite, which only one machine uses."""
        if self._database.dialect.name != "postgresql":
            return True
        try:
            if self._connection is None:
                self._connection = self._database.connect()
                if not self._connection.scalar(sa.select(sa.func.pg_try_advisory_xact_lock(LEADER_LOCK))):
                    self.release()
                    return False
            self._connection.scalar(sa.select(1))
        except SQLAlchemyError:
            self.release()
            return False
        return True

    def release(self) -> None:
        """Release the lock."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(SQLAlchemyError):
                connection.invalidate()  # closing alone would return the connection to the pool with its lock
            connection.close()


class Controller:
    """Reconciles until drained. One thread calls `run`; any thread or signal handler may call `drain`."""

    def __init__(
        self,
        store: ClusterStore,
        fleet: Fleet,
        fitter: Fitter,
        settings: ClusterSettings,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        model: ModelId | None = None,
    ) -> None:
        """`model`: the replicas' model, for which jobs must have been accepted; None accepts any."""
        self.watchdog = Watchdog()  # notified in each iteration of the loop
        self._store = store
        self._model = model
        self._fleet = fleet
        self._fitter = fitter
        self._settings = settings
        self._monotonic = monotonic
        self._draining = threading.Event()
        # What stands in the database. At first it differs from anything, as an earlier controller may have left something.
        self._published: list[dict[str, object]] = [{}]
        self._published_trouble: str | None = ""
        self._explained: dict[str, str] | None = None  # by demand: why its jobs wait
        self._paused: dict[str, tuple[float, float]] = {}  # paused nodes: until when, and for how long
        self._seen: dict[str, tuple[float, Node]] = {}  # nodes, with the time when they were last alive
        self._unfit_since: dict[str, float] = {}  # since when demands fit none of them
        self._missing_loras = MissingLoras()
        self._dead: dict[str, bool] = {}  # workers that ended: whether their node was lost, too
        runner = settings.worker.runner
        self._housekeeper = Housekeeper(
            store,
            max_crashes=runner.attempt.max_crashes,
            tidy_seconds=runner.tidy_seconds,
            max_bytes=runner.max_bytes,
            monotonic=monotonic,
        )
        self._model_watch = ModelWatch(store, runner.model_seconds, monotonic)

    @property
    def draining(self) -> bool:
        """Whether `drain` was called."""
        return self._draining.is_set()

    def drain(self) -> None:
        """End all replicas, and then `run`."""
        self._draining.set()

    def run(self) -> None:
        """Reconcile until `drain`. An unreachable database is retried."""
        leader = Leadership(self._store.database)
        try:
            while not self._draining.is_set():
                self.watchdog.iterated()
                if leader.acquire():
                    self._try(self.reconcile)
                # `drain` may be called by a signal handler, which must not take a lock: poll the flag instead of
                # waiting for it.
                end = self._monotonic() + self._settings.tick_seconds
                while not self._draining.is_set() and (left := end - self._monotonic()) > 0:
                    time.sleep(min(0.1, left))
            if leader.acquire():
                self._end_all()
        finally:
            leader.release()
            self._fleet.close()

    def run_housekeeping(self) -> None:
        """Release the jobs of dead workers until drained.

        Runs in a thread of its own, so that a blocked call to Ray does not stop it.
        """
        while not self._draining.is_set():
            try:
                self._try(self.tidy)
            except Exception as error:  # if this thread ended, dead workers' jobs would stay leased
                log.error("housekeeping failed and is tried again", **describe_error(error))
            time.sleep(self._settings.tick_seconds)

    def tidy(self) -> None:
        """Release the jobs of workers that are reported dead, or whose leases show it."""
        dead = dict(self._dead)
        self._housekeeper.run_once(
            dead=[worker for worker, lost in dead.items() if not lost],
            lost=[worker for worker, lost in dead.items() if lost],
        )
        for worker in dead:
            self._dead.pop(worker, None)
        if self._model is not None:
            self._model_watch.look(self._model)

    def reconcile(self) -> Changes:
        """Compare jobs and replicas once, and make the changes."""
        replicas, gone = self._fleet.poll()
        for one in gone:
            self._note(one)
        waiting = self._store.waiting(model=self._model)
        self._missing_loras.note(replicas, waiting)
        nodes = tuple(
            replace(node, lacks=self._missing_loras.on(node)) for node in self._fleet.nodes(self._store.drained_nodes())
        )
        backlog = self._store.backlog(waiting)
        changes = decide(
            [self._with_pause(node) for node in nodes],
            replicas,
            backlog,
            self._fitter.on,
            self._settings.scale,
            demand_of({}),
        )
        for replica in changes.drain:
            self._fleet.drain(replica)
        for start in changes.start:
            self._fleet.start(start)
        trouble = None if changes.start else find_trouble(nodes, replicas, self._settings.scale)
        reasons = {one.demand: trouble for one in waiting} if trouble is not None else {}
        unfit = {demand: self._why_unfit(demand, waiting, nodes) for demand in changes.unfit}
        reasons |= {demand: trouble or error.message for demand, error in unfit.items()}
        hopeless = self._hopeless(changes.unfit, nodes)
        for group in waiting:
            if group.demand in hopeless:
                error = replace(unfit[group.demand], message=reasons[group.demand])
                refused = self._store.refuse(group, "controller", error, self._model)
                log.warning("jobs fit no node", demand=group.demand, jobs=refused)
        self._explain(reasons)
        self._publish(replicas, nodes)
        if trouble != self._published_trouble:
            if trouble is not None:
                log.warning("no videos are made", reason=trouble)
            self._store.publish_trouble(trouble)
            self._published_trouble = trouble
        return changes

    def _why_unfit(self, demand: str, waiting: Iterable[Waiting], nodes: tuple[Node, ...]) -> JobError:
        """Return why a demand can be started on no node: no node is large enough, or none of those has its LoRA."""
        able = [node for node in nodes if loras_tag(demand) in node.lacks and self._fits(demand, node)]
        if not able:
            return JobError("does_not_fit", _does_not_fit(demand, nodes), "invalid_request_error")
        oldest = next(one.job_id for one in waiting if one.demand == demand)
        return JobError(LoraLostError.code, explain_missing(self._store.loras_of(oldest), able))

    def _fits(self, demand: str, node: Node) -> bool:
        return any(self._fitter.on(shape)(demand).fits for shape in node.shapes(self._settings.scale.gpus))

    def _hopeless(self, unfit: tuple[str, ...], nodes: tuple[Node, ...]) -> frozenset[str]:
        """Return demands that have fitted no node, nor one that may come back, for `unfit_seconds`."""
        now = self._monotonic()
        self._seen |= {node.id: (now, node) for node in nodes}
        self._seen = {key: one for key, one in self._seen.items() if now - one[0] < REMEMBER_SECONDS}
        seen = [node for _, node in self._seen.values()]
        unfit = tuple(
            demand
            for demand in unfit
            if not any(loras_tag(demand) not in node.lacks and self._fits(demand, node) for node in seen)
        )
        self._unfit_since = {demand: self._unfit_since.get(demand, now) for demand in unfit}
        patience = self._settings.unfit_seconds
        return frozenset(demand for demand, since in self._unfit_since.items() if now - since >= patience)

    def _note(self, gone: Gone) -> None:
        if gone.worker is not None:
            self._dead[gone.worker] = gone.lost
        if gone.node is None:
            return
        if gone.failed:
            _, pause = self._paused.get(gone.node, (0.0, FIRST_PAUSE / 2))
            pause = min(pause * 2, LONGEST_PAUSE)
            self._paused[gone.node] = (self._monotonic() + pause, pause)
            log.error("a replica did not come up; its node rests", node=gone.node, seconds=pause)
        elif gone.worker is not None:
            self._paused.pop(gone.node, None)

    def _with_pause(self, node: Node) -> Node:
        """Mark a node as paused if replicas failed to start on it; replicas that run there stay."""
        until, _ = self._paused.get(node.id, (0.0, 0.0))
        return replace(node, resting=True) if self._monotonic() < until else node

    def _publish(self, replicas: tuple[ReplicaView, ...], nodes: tuple[Node, ...]) -> None:
        names = {node.id: node.name for node in nodes}
        rows: list[dict[str, object]] = [
            {
                "id": one.id,
                "node": names.get(one.node or "", "") or (one.node or ""),
                "shape": one.shape.name,
                "state": one.state,
                "worker": one.worker,
                "jobs": len(one.jobs),
            }
            for one in replicas
        ]
        if rows != self._published:
            self._store.publish(rows)
            self._published = rows

    def _explain(self, reasons: dict[str, str]) -> None:
        """Write into queued jobs why they wait, and clear reasons that no longer apply."""
        if reasons != self._explained:
            self._store.explain_none()
            self._explained = reasons
        for demand, reason in reasons.items():
            self._store.explain(demand, reason)

    def _end_all(self) -> None:
        """Drain all replicas because the service stops: their jobs return to the queue."""
        end = self._monotonic() + DRAIN_SECONDS
        while self._monotonic() < end:
            replicas, gone = self._fleet.poll()
            for ended in gone:
                self._note(ended)
            if not replicas:
                break
            for one in replicas:
                self._fleet.drain(one.id)
            time.sleep(0.1)
        self._try(self.tidy)
        self._try(lambda: self._store.publish([]))

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
        except SQLAlchemyError as error:
            log.warning("the job store cannot be reached", error=type(error).__name__)


def _does_not_fit(demand: str, nodes: tuple[Node, ...]) -> str:
    offers = sorted({node.shape(len(node.devices)).name for node in nodes if node.devices or node.computes})
    size, *rest = demand.split("/")
    products = next((f" with products in {part.removeprefix('q=')}" for part in rest if part.startswith("q=")), "")
    nodes_here = ", ".join(offers) or "none"
    return f"A video of {size} (height x width x frames){products} fits no node of this cluster ({nodes_here})."
