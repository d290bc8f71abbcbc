"""The small statements that the store's operations are made of. Each runs inside the caller's transaction."""

import hashlib
import json
from collections.abc import Collection
from typing import Any

import sqlalchemy as sa

from wanduet.jobs.records import (
    OPEN_STATUSES,
    JobError,
    Lease,
    Limits,
    NewJob,
    OutputFile,
    QueueFullError,
    StaleLeaseError,
    StoredJob,
    UnknownJobError,
)
from wanduet.jobs.schema import STEPS, jobs, stages

Values = dict[str, Any]
SIZE_STEP = 100


def to_job(row: "sa.Row[Any]") -> StoredJob:
    """Read one row."""
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
    )


def wanted_names(connection: sa.Connection, job_ids: Collection[str]) -> dict[str, Collection[str] | None]:
    """The published names that jobs hold; None for an open job. A job that is not there is left out."""
    # Filled up, so that there are few statements: drivers keep every text they have seen lately, prepared.
    asked = [*job_ids, *[""] * (-len(job_ids) % SIZE_STEP)]
    rows = connection.execute(sa.select(jobs.c.id, jobs.c.status, jobs.c.files).where(jobs.c.id.in_(asked)))
    return {row.id: None if row.status in OPEN_STATUSES else {file["name"] for file in row.files} for row in rows}


def find_row(connection: sa.Connection, job_id: str, owner: str | None, *, lock: bool = False) -> "sa.Row[Any]":
    """One job's row; only if it is the owner's, where one is given. Raises UnknownJobError."""
    query = sa.select(jobs).where(jobs.c.id == job_id)
    if owner is not None:
        query = query.where(jobs.c.owner == owner)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise UnknownJobError(job_id)
    return row


def update_row(connection: sa.Connection, where: sa.ColumnElement[bool], values: Values) -> "sa.Row[Any] | None":
    """Change at most one row and return it as it is now."""
    return connection.execute(sa.update(jobs).where(where).values(values).returning(jobs)).one_or_none()


def take(
    connection: sa.Connection, which: sa.ColumnElement[bool], worker: str, lease_seconds: float, now: float
) -> Lease | None:
    """Give one queued job to a worker, behind a new token; None if it is not there or not queued any more."""
    values: Values = {
        "status": "in_progress",
        "worker": worker,
        "token": jobs.c.token + 1,
        "beat": jobs.c.beat + 1,
        "lease_seconds": lease_seconds,
        "attempts": jobs.c.attempts + 1,
        "started_at": sa.func.coalesce(jobs.c.started_at, now),
    }
    row = update_row(connection, sa.and_(which, jobs.c.status == "queued"), values)
    return None if row is None else Lease(to_job(row), worker, row.token, lease_seconds)


def held(lease: Lease) -> sa.ColumnElement[bool]:
    """The fence: true only while the lease is the newest of its job and the job still runs."""
    return sa.and_(
        jobs.c.id == lease.job.id,
        jobs.c.status == "in_progress",
        jobs.c.token == lease.token,
        jobs.c.worker == lease.worker,
    )


def commit(connection: sa.Connection, lease: Lease, values: Values) -> "sa.Row[Any]":
    """Change the job behind the fence. Raises StaleLeaseError."""
    row = update_row(connection, held(lease), values)
    if row is None:
        raise stale(lease)
    return row


def stale(lease: Lease) -> StaleLeaseError:
    """What a worker hears that lost its job."""
    return StaleLeaseError(f"Worker {lease.worker} no longer holds job {lease.job.id} (token {lease.token}).")


def check_limits(connection: sa.Connection, owner: str, limits: Limits) -> None:
    """Raises QueueFullError when one more open job would be too many."""
    open_jobs = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.status.in_(OPEN_STATUSES))
    if limits.per_owner is not None:
        mine = connection.scalar(open_jobs.where(jobs.c.owner == owner)) or 0
        if mine >= limits.per_owner:
            raise QueueFullError(limits.per_owner, personal=True)
    if limits.queue is not None and (connection.scalar(open_jobs) or 0) >= limits.queue:
        raise QueueFullError(limits.queue, personal=False)


def count_stages(connection: sa.Connection, waited: float, report: Values) -> None:
    """Add a finished job's seconds and steps to the sums; timings of what is no stage are left out."""
    timings = {"queue_s": waited, **report.get("timings", {})}
    counted = {name: (value, 1) for name, value in timings.items() if name != STEPS}
    if steps := report.get("steps", 0):
        counted[STEPS] = (timings.get("denoise_s", 0.0), steps)
    for name, (value, count) in sorted(counted.items()):
        changed = {"seconds": stages.c.seconds + float(value), "count": stages.c.count + count}
        connection.execute(sa.update(stages).where(stages.c.name == name).values(changed))


def fingerprint(new: NewJob) -> str:
    """A digest of what was asked for, to tell a repetition from another request under the same key."""
    asked = json.dumps([new.model, new.request, new.remixed_from], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(asked.encode()).hexdigest()
