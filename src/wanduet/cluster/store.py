"""The job store of a cluster's replicas: the same rows, leases and fencing tokens, claimed in the scheduler's order.

It adds tables for each owner's position in virtual time, and for what the controller publishes about replicas and nodes. No
job depends on their content.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from wanduet.cluster import scheduler
from wanduet.cluster.autoscaler import Backlog
from wanduet.cluster.fit import FitOf
from wanduet.cluster.loras import NodeLoras
from wanduet.cluster.scheduler import PATIENCE_SECONDS, Pick, Share, Waiting
from wanduet.jobs import statements
from wanduet.jobs.database import OPEN_SECONDS
from wanduet.jobs.files import JobFiles
from wanduet.jobs.records import WAITING, JobError, Lease, ModelId, StoredJob, submitted_at
from wanduet.jobs.schema import SERIAL, jobs
from wanduet.jobs.store import JobStore
from wanduet.loras import Lora

TRIES = 8  # jobs that a claim tries before it reads the queue again
UNFIT_LEASE_SECONDS = 30.0

metadata = sa.MetaData()

shares = sa.Table(
    "cluster_shares",
    metadata,
    sa.Column("owner", sa.String(128), primary_key=True),
    sa.Column("start", sa.Double, nullable=False),
    sa.Column("finish", sa.Double, nullable=False),
)

replicas = sa.Table(
    "cluster_replicas",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("node", sa.String(255), nullable=False),
    sa.Column("shape", sa.String(64), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("worker", sa.String(255)),
    sa.Column("jobs", sa.Integer, nullable=False),
)

drains = sa.Table(
    "cluster_drains",
    metadata,
    sa.Column("node", sa.String(255), primary_key=True),  # its name, or a prefix of its Ray id
)


# Why the controller can make no videos: at most one row.
troubles = sa.Table("cluster_trouble", metadata, sa.Column("trouble", sa.Text, primary_key=True))

# Built once, for the same reason as those in `jobs.statements`.
_REPLICAS = sa.select(replicas).order_by(replicas.c.node, replicas.c.id)
_GROUP = (jobs.c.owner, jobs.c.demand, jobs.c.priority)
_WAITING = (
    sa.select(*_GROUP, sa.func.min(jobs.c.id), sa.func.count())
    .where(jobs.c.status == "queued", statements.OF_MODEL)
    .group_by(*_GROUP)
)
_WAITING_UNBLAMED = _WAITING.where(jobs.c.crashes == 0)
_OLDEST = (
    sa.select(jobs.c.id)
    .where(
        jobs.c.status == "queued",
        statements.OF_MODEL,
        *(column == sa.bindparam(f"of_{column.name}") for column in _GROUP),
    )
    .order_by(jobs.c.id)
    .limit(1)
    .with_for_update(skip_locked=True)
)
_TAKE = statements.taking(jobs.c.id == _OLDEST.scalar_subquery())
_TAKE_UNBLAMED = statements.taking(jobs.c.id == _OLDEST.where(jobs.c.crashes == 0).scalar_subquery())


def _loras_in(request: dict[str, Any]) -> list[Lora]:
    return [Lora(**lora) for lora in request.get("loras") or ()]


def _later(one: Any, other: Any) -> Any:
    """Return the greater of two expressions."""
    return sa.case((one > other, one), else_=other)


def _charging(insert: Any) -> Any:
    """Return a statement that charges a claim to its owner; a single one, so that concurrent charges add up."""
    virtual = sa.select(sa.func.coalesce(sa.func.max(shares.c.start), 0.0)).scalar_subquery()
    seconds = sa.bindparam("device_seconds", type_=sa.Double)
    first = scheduler.charge(0.0, virtual, seconds, lambda _, virtual: virtual)  # for an owner without a row
    insert = insert(shares).values(owner=sa.bindparam("of_owner"), start=first[0], finish=first[1])
    again = scheduler.charge(shares.c.finish, insert.excluded.start, seconds, _later)
    place = {"start": again[0], "finish": again[1]}
    return insert.on_conflict_do_update(index_elements=["owner"], set_=place)


_CHARGE = {"postgresql": _charging(postgresql.insert), "sqlite": _charging(sqlite.insert)}


class ClusterStore(JobStore):
    """A job store whose `claim` takes jobs that fit a replica, in the scheduler's order.

    `fit_of` predicts what fits (None: this process claims nothing); `devices` is the replica's number of GPUs.
    """

    def __init__(
        self,
        files: JobFiles,
        url: str | None = None,
        *,
        fit_of: FitOf | None = None,
        devices: int = 1,
        patience_seconds: float = PATIENCE_SECONDS,
        **options: Any,
    ) -> None:
        super().__init__(files, url, **options)
        self._fit_of = fit_of
        self._devices = devices
        self._patience = patience_seconds
        self.loras: NodeLoras | None = None  # of the replica's node: jobs with others are not claimed
        self._create_tables()

    def claim(
        self, worker: str, lease_seconds: float, *, alone: bool = True, model: ModelId | None = None
    ) -> Lease | None:
        """Claim the next job for this replica, or return None. No other worker gets the same job."""
        if self._fit_of is None:
            return None
        for pick in self._picks(self._fit_of, alone, model)[:TRIES]:
            with self._write() as connection:
                lease = self._take(connection, pick.waiting, worker, lease_seconds, alone, model)
                if lease is not None:
                    charged = {"of_owner": pick.waiting.owner, "device_seconds": pick.device_seconds}
                    connection.execute(_CHARGE[self.database.dialect.name], charged)
                    return lease
        return None

    def lacks_loras(self, job: StoredJob) -> bool:
        """Return whether this node has not the LoRA files of a job."""
        return self.loras is not None and not self.loras.has(_loras_in(job.request))

    def loras_of(self, job_id: str) -> list[Lora]:
        """Return the LoRA of a job; none if it is gone."""
        with self._read() as connection:
            return _loras_in(connection.scalar(sa.select(jobs.c.request).where(jobs.c.id == job_id)) or {})

    def waiting(self, alone: bool = True, model: ModelId | None = None) -> tuple[Waiting, ...]:
        """Return queued jobs in groups.

        Without `alone`, jobs that crashed before are left out; `model` restricts them to one model.
        """
        with self._read() as connection:
            return self._waiting(connection, alone, model)

    def backlog(self, waiting: Iterable[Waiting]) -> tuple[Backlog, ...]:
        """Group the same jobs by demand alone, for the autoscaler."""
        now = self._clock()
        found: dict[str, Backlog] = {}
        for one in waiting:
            known = found.get(one.demand, Backlog(one.demand, 0, 0.0))
            waited = max(known.waited, now - one.since)
            found[one.demand] = Backlog(one.demand, known.count + one.count, waited)
        return tuple(found.values())

    def refuse(self, waiting: Waiting, worker: str, error: JobError, model: ModelId | None = None) -> int:
        """Fail the jobs of a group that fits no node, each under a lease; return their number."""
        refused = 0
        while True:
            with self._write() as connection:
                lease = self._take(connection, waiting, worker, UNFIT_LEASE_SECONDS, True, model)
            if lease is None:
                return refused
            self.fail(lease, error)
            refused += 1

    def explain(self, demand: str, reason: str) -> None:
        """Write into queued jobs of a demand why no replica takes them; jobs with a phase are left unchanged."""
        which = sa.and_(jobs.c.status == "queued", jobs.c.demand == demand, jobs.c.phase == "")
        with self._read() as connection:
            if connection.scalar(sa.select(jobs.c.id).where(which).limit(1)) is None:
                return
        with self._write() as connection:
            connection.execute(sa.update(jobs).where(which).values(phase=WAITING, report={WAITING: reason}))

    def explain_none(self) -> None:
        """Clear what `explain` wrote into jobs that are still queued."""
        which = sa.and_(jobs.c.status == "queued", jobs.c.phase == WAITING)
        with self._write() as connection:
            connection.execute(sa.update(jobs).where(which).values(phase="", report={}))

    # The controller's tables.

    def publish(self, rows: Iterable[dict[str, Any]]) -> None:
        """Replace the list of replicas: `id`, `node`, `shape`, `state`, `worker`, `jobs` (how many)."""
        found = list(rows)
        with self._write() as connection:
            connection.execute(sa.delete(replicas))
            if found:
                connection.execute(sa.insert(replicas), found)

    def replicas(self) -> list[dict[str, Any]]:
        """Return the controller's last list of replicas."""
        with self._read() as connection:
            return [dict(row) for row in connection.execute(_REPLICAS).mappings()]

    def publish_trouble(self, trouble: str | None) -> None:
        """Store why no videos can be made; None if they can."""
        with self._write() as connection:
            connection.execute(sa.delete(troubles))
            if trouble is not None:
                connection.execute(sa.insert(troubles).values(trouble=trouble))

    def trouble(self) -> str | None:
        """Return what `publish_trouble` stored last; None before."""
        with self._read() as connection:
            found: str | None = connection.scalar(sa.select(troubles.c.trouble))
            return found

    def drain_node(self, node: str) -> None:
        """Request that a node is drained; it stays so until `undrain_node`."""
        with self._write() as connection:
            connection.execute(sa.delete(drains).where(drains.c.node == node))
            connection.execute(sa.insert(drains).values(node=node))

    def undrain_node(self, node: str) -> bool:
        """Let replicas start on a node again; return False if it was not being drained."""
        with self._write() as connection:
            return connection.execute(sa.delete(drains).where(drains.c.node == node)).rowcount > 0

    def drained_nodes(self) -> frozenset[str]:
        """Return the nodes that shall be drained."""
        with self._read() as connection:
            return frozenset(connection.scalars(sa.select(drains.c.node)))

    # Internals.

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        """Read without a transaction on PostgreSQL: one network round trip instead of three."""
        if self.database.dialect.name == "sqlite":
            with super()._read() as connection:
                yield connection
        else:
            self._presence.check()
            with self.database.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                yield connection

    def _picks(self, fit_of: FitOf, alone: bool, model: ModelId | None) -> list[Pick]:
        with self._read() as connection:
            waiting = self._waiting(connection, alone, model)
            # A single owner is first, whatever its share.
            alike = len({one.owner for one in waiting}) <= 1
            rows = [] if alike else connection.execute(sa.select(shares)).all()
        if self.loras is not None:
            waiting = tuple(self.loras.available(waiting, self.loras_of))
        known = {row.owner: Share(row.start, row.finish) for row in rows}
        return scheduler.order(
            waiting, known, fit_of, self._clock(), devices=self._devices, patience_seconds=self._patience
        )

    def _waiting(self, connection: sa.Connection, alone: bool, model: ModelId | None) -> tuple[Waiting, ...]:
        query = _WAITING if alone else _WAITING_UNBLAMED
        # Job ids begin with the milliseconds of submission, so the query needs only the index.
        return tuple(
            Waiting(owner, demand, priority, first, submitted_at(first), count)
            for owner, demand, priority, first, count in connection.execute(query, statements.of_model(model))
        )

    def _take(
        self,
        connection: sa.Connection,
        waiting: Waiting,
        worker: str,
        lease_seconds: float,
        alone: bool,
        model: ModelId | None = None,
    ) -> Lease | None:
        """Claim the oldest job of a group that no other worker is claiming."""
        group = {f"of_{column.name}": getattr(waiting, column.name) for column in _GROUP}
        group |= statements.of_model(model)
        oldest = _TAKE if alone else _TAKE_UNBLAMED
        return statements.take(connection, oldest, worker, lease_seconds, self._clock(), **group)

    def _create_tables(self) -> None:
        with self._read() as connection:  # if the tables exist, this waits for no writer
            if all(sa.inspect(connection).has_table(name) for name in metadata.tables):
                return
        # Serialise creation: on PostgreSQL, two processes that create a table at one time fail.
        options = {SERIAL: time.monotonic() + OPEN_SECONDS}
        with self.database.connect().execution_options(**options) as connection, connection.begin():
            if self.database.dialect.name == "postgresql":
                connection.execute(sa.text(f"SET LOCAL lock_timeout = {int(OPEN_SECONDS * 1000)}"))
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(7761)"))
            metadata.create_all(connection)
