"""The SQL statements of the store's operations. Each runs inside the caller's transaction.

Statements that every job needs are built once, at import: SQLAlchemy takes longer to build one and to find its compiled
form than a database takes to run it. Their parameters have names that differ from all columns' names.
"""

import hashlib
import json
import secrets
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from wanduet.jobs.records import (
    OPEN_STATUSES,
    IdempotencyError,
    JobError,
    Lease,
    Limits,
    ModelId,
    NewJob,
    Order,
    OutputFile,
    QueueFullError,
    StaleLeaseError,
    Status,
    StoredJob,
    UnknownJobError,
    demand_of,
    make_id,
)
from wanduet.jobs.schema import STAGE_NAMES, STEPS, deleted, jobs, stages, state, webhooks

Values = dict[str, Any]
SIZE_STEP = 100

_IDS: sa.BindParameter[Any] = sa.bindparam("ids", expanding=True)
_LOOKED_UP = jobs.c.id.in_(_IDS)
_SCANNED = (jobs.c.id + "").in_(_IDS)  # an expression without an index, which forces a scan

NEWEST = sa.select(state.c.newest_id).with_for_update()
_INSERT = sa.insert(jobs).returning(jobs)

_COUNTED = sa.func.count()
_OPEN = sa.select(_COUNTED.filter(jobs.c.owner == sa.bindparam("owner")), _COUNTED).where(
    jobs.c.status.in_(OPEN_STATUSES)
)

# The fencing condition: the job still runs and the lease is its newest. `leased` gives the lease's parameters.
_LEASED = sa.and_(
    jobs.c.id == sa.bindparam("lease_id"),
    jobs.c.status == "in_progress",
    jobs.c.token == sa.bindparam("lease_token"),
    jobs.c.worker == sa.bindparam("lease_worker"),
)
CHECK = sa.select(jobs.c.id).where(_LEASED)
LOCK_LEASED = sa.select(jobs).where(_LEASED).with_for_update()
UPDATE_LEASED = sa.update(jobs).where(_LEASED).returning(jobs)
BEAT = UPDATE_LEASED.values(beat=jobs.c.beat + 1)
_PERCENT = sa.bindparam("percent", type_=sa.Double)
PROGRESS = BEAT.values(progress=sa.case((jobs.c.progress < _PERCENT, _PERCENT), else_=jobs.c.progress))

# One statement for all sums, to save round trips. The rows are locked in the order of their names, so that two workers
# that complete jobs at the same time do not deadlock.
_SUMS = sa.select(stages.c.name).order_by(stages.c.name).with_for_update().subquery()
_COUNT_STAGES = (
    sa.update(stages)
    .where(stages.c.name == _SUMS.c.name)
    .values(
        {
            column: column
            + sa.case(
                {name: sa.bindparam(f"{name}_{column.name}", type_=column.type) for name in STAGE_NAMES},
                value=stages.c.name,
                else_=0,
            )
            for column in (stages.c.seconds, stages.c.count)
        }
    )
)


def to_job(row: "sa.Row[Any]") -> StoredJob:
    """Convert one row."""
    error = None
    if row.error_code is not None:
        error = JobError(row.error_code, row.error_message, row.error_type, row.error_param)
    return StoredJob(
        id=row.id,
        owner=row.owner,
        model=row.model,
        request=row.request,
        status=row.status,
        priority=row.priority,
        progress=row.progress,
        phase=row.phase,
        seconds_left=row.seconds_left,
        created_at=row.created_at,
        started_at=row.started_at,
        completed_at=row.completed_at,
        expires_at=row.expires_at,
        error=error,
        remixed_from=row.remixed_from,
        files=tuple(OutputFile(**file) for file in row.files),
        report=row.report,
        attempts=row.attempts,
        crashes=row.crashes,
        worker=row.worker,
        token=row.token,
        model_hash=row.model_hash,
    )


def wanted_names(
    connection: sa.Connection, job_ids: Collection[str], *, by_scan: bool = False
) -> dict[str, Collection[str] | None]:
    """Return the names of published files by job; None for an open job. Jobs that do not exist are left out.

    `by_scan`: read the whole table without its indexes, which may be damaged.
    """
    query = sa.select(jobs.c.id, jobs.c.status, jobs.c.files).where(_SCANNED if by_scan else _LOOKED_UP)
    found: dict[str, Collection[str] | None] = {}
    for ids in _filled(job_ids):
        for row in connection.execute(query, {"ids": ids}):
            found[row.id] = None if row.status in OPEN_STATUSES else {file["name"] for file in row.files}
    return found


def deleted_among(connection: sa.Connection, job_ids: Collection[str]) -> set[str]:
    """Return those of the ids whose jobs were deleted recently."""
    query = sa.select(deleted.c.id).where(deleted.c.id.in_(_IDS))
    return {job_id for ids in _filled(job_ids) for job_id in connection.scalars(query, {"ids": ids})}


def _filled(job_ids: Collection[str]) -> list[list[str]]:
    """Return the ids padded to a multiple of `SIZE_STEP`, so that drivers cache few statements; no list without ids."""
    return [[*job_ids, *[""] * (-len(job_ids) % SIZE_STEP)]] if job_ids else []


def find_row(connection: sa.Connection, job_id: str, owner: str | None, *, lock: bool = False) -> "sa.Row[Any]":
    """Return one job's row; with `owner`, only if it is theirs. Raises UnknownJobError."""
    query = sa.select(jobs).where(jobs.c.id == job_id)
    if owner is not None:
        query = query.where(jobs.c.owner == owner)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise UnknownJobError(job_id)
    return row


def by_age(order: Order, owner: str | None, status: Status | None, after: str | None) -> "sa.Select[Any]":
    """Select jobs from the oldest ("asc") or the newest ("desc") on.

    `owner` and `status`: only those jobs, None for all. `after`: only jobs that follow the one of that id.
    """
    query = sa.select(jobs).order_by(jobs.c.id if order == "asc" else jobs.c.id.desc())
    if owner is not None:
        query = query.where(jobs.c.owner == owner)
    if status is not None:
        query = query.where(jobs.c.status == status)
    if after is not None:
        query = query.where(jobs.c.id > after if order == "asc" else jobs.c.id < after)
    return query


def find_by_key(connection: sa.Connection, owner: str, key: str | None, fingerprint: str) -> StoredJob | None:
    """Return the job stored under an idempotency key, if any. Raises IdempotencyError if its request was different."""
    if key is None:
        return None
    same = sa.and_(jobs.c.owner == owner, jobs.c.idempotency_key == key)
    row = connection.execute(sa.select(jobs).where(same)).one_or_none()
    if row is not None and row.fingerprint != fingerprint:
        raise IdempotencyError("This idempotency key was used for another request.")
    return None if row is None else to_job(row)


def new_id(connection: sa.Connection, newest: str | None, now: float) -> str:
    """Return an id for a job, which later ones exceed; `newest` is what NEWEST returned."""
    job_id = make_id(now, newest)
    connection.execute(sa.update(state).values(newest_id=job_id))
    return job_id


def insert(connection: sa.Connection, new: NewJob, files: Sequence[OutputFile], added: Values) -> StoredJob:
    """Insert a queued job; `added` has its `id`, `fingerprint` and `created_at`, `files` its inputs."""
    values = asdict(new)
    urls = values.pop("webhooks")
    values |= {
        **added,
        "status": "queued",
        "demand": demand_of(new.request),
        "files": [asdict(file) for file in files],
        "files_bytes": sum(file.num_bytes for file in files),
        "report": {},
    }
    job = to_job(connection.execute(_INSERT, values).one())
    if urls:
        rows = [{"id": f"evt_{secrets.token_hex(16)}", "job": job.id, "url": url} for url in urls]
        connection.execute(sa.insert(webhooks), rows)
    return job


def update_row(connection: sa.Connection, where: sa.ColumnElement[bool], values: Values) -> "sa.Row[Any] | None":
    """Update at most one row and return it."""
    return connection.execute(sa.update(jobs).where(where).values(values).returning(jobs)).one_or_none()


def taking(which: sa.ColumnElement[bool]) -> sa.Update:
    """Return a statement for `take`, which gives one queued job to a worker, with a new token."""
    return (
        sa.update(jobs)
        .where(which, jobs.c.status == "queued")
        .values(
            status="in_progress",
            token=jobs.c.token + 1,
            beat=jobs.c.beat + 1,
            attempts=jobs.c.attempts + 1,
            started_at=sa.func.coalesce(jobs.c.started_at, sa.bindparam("now", type_=sa.Double)),
        )
        .returning(jobs)
    )


# Jobs that were accepted for the model of `of_model`; for any model if that is None. Weights with the same hash are the
# same model under any name; if one side has no hash, the names are compared.
_SERVED_NAME, _SERVED_HASH = (sa.bindparam(name, type_=sa.String) for name in ("served_name", "served_hash"))
OF_MODEL = sa.or_(
    _SERVED_NAME.is_(None),
    sa.func.coalesce(jobs.c.model_hash, "-") == _SERVED_HASH,
    sa.and_(jobs.c.model == _SERVED_NAME, sa.or_(jobs.c.model_hash.is_(None), _SERVED_HASH == "")),
)

_running = jobs.alias()
_SAME_HASH = sa.func.coalesce(_running.c.model_hash, "") == sa.func.coalesce(jobs.c.model_hash, "")
_RUNS_SOMEWHERE = sa.exists().where(_running.c.status == "in_progress", _running.c.model == jobs.c.model, _SAME_HASH)
# Models of queued jobs, except that of `of_model` and those of which a job runs; each with its oldest job's id.
OTHER_MODELS = (
    sa.select(jobs.c.model, jobs.c.model_hash, sa.func.min(jobs.c.id))
    .where(jobs.c.status == "queued", sa.not_(OF_MODEL), sa.not_(_RUNS_SOMEWHERE))
    .group_by(jobs.c.model, jobs.c.model_hash)
)

_FIRST = (
    sa.select(jobs.c.id)
    .where(jobs.c.status == "queued", OF_MODEL)
    .order_by(jobs.c.priority.desc(), jobs.c.id)
    .limit(1)
    .with_for_update(skip_locked=True)
    .scalar_subquery()
)
TAKE_FIRST = taking(jobs.c.id == _FIRST)
TAKE_FIRST_UNBLAMED = taking(sa.and_(jobs.c.id == _FIRST, jobs.c.crashes == 0))


def of_model(model: ModelId | None) -> Values:
    """Return the parameters of a statement with OF_MODEL; None: any model."""
    return {"served_name": None if model is None else model.name, "served_hash": (model and model.hash) or ""}


def take(
    connection: sa.Connection, statement: sa.Update, worker: str, lease_seconds: float, now: float, **which: Any
) -> Lease | None:
    """Run a statement of `taking`; return None if it finds no queued job."""
    parameters = {"worker": worker, "lease_seconds": lease_seconds, "now": now, **which}
    row = connection.execute(statement, parameters).one_or_none()
    return None if row is None else Lease(to_job(row), worker, row.token, lease_seconds)


def leased(lease: Lease) -> Values:
    """Return the parameters of a statement with the fencing condition."""
    return {"lease_id": lease.job.id, "lease_token": lease.token, "lease_worker": lease.worker}


def update_leased(
    connection: sa.Connection, lease: Lease, values: Values, statement: sa.Update = UPDATE_LEASED
) -> "sa.Row[Any] | None":
    """Update the job if the lease is still valid and return it; None if it is not."""
    return connection.execute(statement, {**leased(lease), **values}).one_or_none()


def commit(
    connection: sa.Connection, lease: Lease, values: Values, statement: sa.Update = UPDATE_LEASED
) -> "sa.Row[Any]":
    """As `update_leased`, but raises StaleLeaseError."""
    row = update_leased(connection, lease, values, statement)
    if row is None:
        raise stale(lease)
    return row


def stale(lease: Lease) -> StaleLeaseError:
    """Return the error for a worker that lost its job."""
    return StaleLeaseError(f"Worker {lease.worker} no longer holds job {lease.job.id} (token {lease.token}).")


def check_limits(connection: sa.Connection, owner: str, limits: Limits) -> None:
    """Raise QueueFullError if one more open job would exceed a limit."""
    if limits == Limits():
        return
    mine, everybodys = connection.execute(_OPEN, {"owner": owner}).one()
    if limits.per_owner is not None and mine >= limits.per_owner:
        raise QueueFullError(limits.per_owner, personal=True)
    if limits.queue is not None and everybodys >= limits.queue:
        raise QueueFullError(limits.queue, personal=False)


def count_stages(connection: sa.Connection, waited: float, report: Values) -> None:
    """Add a finished job's seconds and steps to the sums; timings that are not of a stage are left out."""
    timings = {"queue_s": waited, **report.get("timings", {})}
    counted = {name: (value, 1) for name, value in timings.items() if name != STEPS}
    if steps := report.get("steps", 0):
        counted[STEPS] = (timings.get("denoise_s", 0.0), steps)
    parameters: Values = {}
    for name in STAGE_NAMES:
        value, count = counted.get(name, (0.0, 0))
        parameters |= {f"{name}_seconds": float(value), f"{name}_count": count}
    connection.execute(_COUNT_STAGES, parameters)


def fingerprint(new: NewJob) -> str:
    """Return a digest of the request, to distinguish a repetition from a different request under the same key."""
    content = json.dumps([new.model, new.request, new.remixed_from], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()
