"""The job store of a cluster's replicas: the same rows, leases and fencing tokens, claimed in the scheduler's order.

It adds tables for each owner's position in virtual time, and for what the controller publishes about replicas, nodes
and stages. No job depends on their content.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from wanduet.cluster import scheduler
from wanduet.cluster.autoscaler import Backlog
from wanduet.cluster.fit import FitOf
from wanduet.cluster.handover import Handover, leaves_decode, ready_decoders
from wanduet.cluster.loras import NodeLoras
from wanduet.cluster.scheduler import PATIENCE_SECONDS, Pick, Share, Waiting
from wanduet.jobs import statements
from wanduet.jobs.database import OPEN_SECONDS
from wanduet.jobs.files import JobFiles
from wanduet.jobs.records import DECODE, WAITING, JobError, Lease, ModelId, StoredJob, demand_of, submitted_at
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


# The controller's stage plan: one row, for people and `wanduet cluster status`.
verdicts = sa.Table(
    "cluster_stages",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("verdict", sa.JSON, nullable=False),
)

# Built once, for the same reason as those in `jobs.statements`.
_REPLICAS = sa.select(replicas).order_by(replicas.c.node, replicas.c.id)
_DECODES = sa.select(sa.func.count()).where(jobs.c.status == "queued", jobs.c.demand.startswith(DECODE))
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
    `handover`: pass it to a replica that does whole jobs and may leave decodes to decoders.
    """

    def __init__(
        self,
        files: JobFiles,
        url: str | None = None,
        *,
        fit_of: FitOf | None = None,
        devices: int = 1,
        patience_seconds: float = PATIENCE_SECONDS,
        handover: Handover | None = None,
        **options: Any,
    ) -> None:
        super().__init__(files, url, **options)
        self._fit_of = fit_of
        self._devices = devices
        self._patience = patience_seconds
        self._handover = handover
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

    def has_decoder(self, job: StoredJob) -> bool:
        """Return whether to leave a job's decode to a decoder. If none takes it, a replica takes it back."""
        if self._handover is None:
            return False
        fits, decoders = self._handover.fits, self.decoders()
        if not decoders:
            return False
        with self._read() as connection:
            queued = connection.scalar(_DECODES) or 0
        return leaves_decode(job, decoders, queued, lambda shape: fits(shape, DECODE + demand_of(job.request)))

    def lacks_loras(self, job: StoredJob) -> bool:
        """Return whether this node has not the LoRA files of a job."""
        return self.loras is not None and not self.loras.has(_loras_in(job.request))

    def loras_of(self, job_id: str) -> list[Lora]:
        """Return the LoRA of a job; none if it is gone."""
        with self._read() as connection:
            return _loras_in(connection.scalar(sa.select(jobs.c.request).where(jobs.c.id == job_id)) or {})

    def decoders(self) -> list[str]:
        """Return the shapes of ready decoders, from the controller's last list."""
        return ready_decoders(self.replicas())

    def prompts_ahead(self, limit: int) -> tuple[StoredJob, ...]:
        """Return queued jobs whose text may need encoding, in the approximate order of claims."""
        query = sa.select(jobs).where(jobs.c.status == "queued", sa.not_(jobs.c.demand.startswith(DECODE)))
        with self._read() as connection:
            rows = connection.execute(query.order_by(jobs.c.priority.desc(), jobs.c.id).limit(limit)).all()
        return tuple(statements.to_job(row) for row in rows)

    @contextmanager
    def sole(self, keys: Iterable[str]) -> Iterator[frozenset[str]]:
        """Lock those of the keys that no other process has locked, until the block or the connection ends."""
        found = list(keys)
        if self.database.dialect.name != "postgresql":  # SQLite is used by one machine only
            yield frozenset(found)
            return
        with self.database.connect() as connection:  # its transaction stays open, and owns the locks
            numbers = {key: int.from_bytes(sha256(key.encode()).digest()[:8], signed=True) for key in found}
            lock = sa.func.pg_try_advisory_xact_lock
            mine = [key for key in found if connection.scalar(sa.select(lock(numbers[key])))]
            try:
                yield frozenset(mine)
            finally:
                connection.invalidate()  # ending the connection releases its locks, whatever its state

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

    def publish_stages(self, verdict: dict[str, Any]) -> None:
        """Store which nodes are dedicated to a stage, and why."""
        with self._write() as connection:
            connection.execute(sa.delete(verdicts))
            connection.execute(sa.insert(verdicts).values(id=1, verdict=verdict))

    def stages(self) -> dict[str, Any]:
        """Return the dict that `publish_stages` stored last; empty before."""
        with self._read() as connection:
            return dict(connection.scalar(sa.select(verdicts.c.verdict)) or {})

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

    def _after_crash(self, row: "sa.Row[Any]", error: JobError, max_crashes: int, alone: bool = True) -> dict[str, Any]:
        """Make a whole job of one on which a decoder crashed: the next attempt finds its latents and only decodes."""
        return super()._after_crash(row, error, max_crashes, alone) | {"demand": demand_of(row.request)}

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
        if self._handover is not None:
            waiting = tuple(self._handover.take_back(waiting, self.decoders))
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
