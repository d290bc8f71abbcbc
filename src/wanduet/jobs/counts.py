"""Counts and sums over the queue, for metrics."""

import sqlalchemy as sa

from wanduet.jobs.records import Statistics
from wanduet.jobs.schema import jobs, stages


def count_jobs(connection: sa.Connection, owner: str | None, now: float) -> Statistics:
    """Return the queue at `now` (Unix seconds), and the summed seconds of all completed jobs by stage.

    With `owner`, only that owner's jobs are counted, and the sums, which are not kept by owner, are left out.
    """
    counted = sa.func.count()
    theirs = sa.true() if owner is None else jobs.c.owner == owner
    failed = sa.and_(theirs, jobs.c.error_code.is_not(None))
    by_status = sa.select(jobs.c.status, counted).where(theirs).group_by(jobs.c.status)
    by_code = sa.select(jobs.c.error_code, counted).where(failed).group_by(jobs.c.error_code)
    oldest = sa.select(sa.func.min(jobs.c.created_at)).where(theirs, jobs.c.status == "queued")
    done = sa.select(jobs.c.report).where(theirs, jobs.c.status == "completed")
    waiting = connection.scalar(oldest)
    sums = connection.execute(sa.select(stages)).all() if owner is None else ()
    return Statistics(
        {row[0]: row[1] for row in connection.execute(by_status)},
        {row[0]: row[1] for row in connection.execute(by_code)},
        0.0 if waiting is None else max(0.0, now - waiting),
        {row[0]: (row[1], row[2]) for row in sums},
        (connection.scalar(done.order_by(jobs.c.completed_at.desc()).limit(1)) or {}).get("peak_memory_bytes", {}),
    )
