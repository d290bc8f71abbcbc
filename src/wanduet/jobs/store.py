"""The durable queue: every acknowledged state of a job survives a kill, and at most one worker owns a job.

Leases do not depend on the wall clock. A lease has a token, which grows with each claim, and a heartbeat counter, which
its worker increments. A watcher measures with its own monotonic clock that a counter does not change (`jobs.leases`)
and takes the job away with `recover`, which does nothing if the counter changed meanwhile. Wall-clock times are stored
only for display and for retention.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import structlog

from wanduet.jobs import endings, statements
from wanduet.jobs.counts import count_jobs
from wanduet.jobs.database import LOCK_SECONDS, fold_log, sqlite_path
from wanduet.jobs.files import JobFiles
from wanduet.jobs.identity import check_pair, open_paired
from wanduet.jobs.leases import outlived_by_supervisor
from wanduet.jobs.presence import Presence
from wanduet.jobs.prompts import forget_prompts
from wanduet.jobs.records import (
    CANCELLED,
    MAX_PAGE,
    OPEN_STATUSES,
    WORKER_CRASHED,
    ForeignDatabaseError,
    IdempotencyError,
    JobError,
    Lease,
    Limits,
    ModelId,
    NewJob,
    Order,
    OutputFile,
    Page,
    Pulse,
    QueueFullError,
    Statistics,
    Status,
    StoredJob,
    Submitted,
)
from wanduet.jobs.retention import Retention, delete_rows, remove_files
from wanduet.jobs.schema import SERIAL, jobs
from wanduet.jobs.sweep import Sweeper
from wanduet.jobs.writers import WriterQueue

log = structlog.get_logger(__name__)

Values = dict[str, Any]


class JobStore:
    """Jobs in a database and their files in a data folder. Safe to use from any thread and any process.

    `clock` returns Unix seconds; a finished job is kept for `retention_seconds` (None: for ever). Every call raises
    SQLAlchemyError if the database cannot be used at the moment, and StoreBrokenError if an operator has to fix it.
    Reads do not wait for writers; a write waits at most `writers.patience` seconds.
    """

    def __init__(
        self,
        files: JobFiles,
        url: str | None = None,
        *,
        clock: Callable[[], float] = time.time,
        retention_seconds: float | None = None,
        connections: int = 10,
    ) -> None:
        """Raises ConfigError for an invalid address, ForeignDatabaseError for the database of another folder."""
        url = url or files.default_url
        self.files = files
        self.database = open_paired(files, url, connections)
        self.retention_seconds = retention_seconds
        self._clock = clock
        file = sqlite_path(url)
        self._presence = Presence([files.folder] if file is None else [files.folder, file])
        # SQLite admits one writer and makes the others poll; a queue of this process's threads is fair and faster.
        self.writers = WriterQueue(LOCK_SECONDS, alone=file is not None)
        self._retention = Retention(files, self.database, (self._read, self._write), clock)
        self._sweepers = [Sweeper(place, self._read, clock) for place in files.places]

    def close(self) -> None:
        """Close the connections."""
        self.database.dispose()
        self._presence.close()

    # For clients.

    def submit(self, new: NewJob, limits: Limits | None = None, source: Path | None = None) -> Submitted:
        """Store a job, and before it a copy of the video `source` that it starts from. On return both are on the disk.

        Raises QueueFullError (nothing stored), IdempotencyError (the key belongs to another request), or OutputError if
        the copy cannot be stored.
        """
        if source is None:
            return self._insert(new, limits or Limits())
        with self._write() as connection:
            job_id = statements.new_id(connection, connection.scalar(statements.NEWEST), self._clock())
        file = self.files.add_input(job_id, source)
        try:
            done = self._insert(new, limits or Limits(), job_id, [file])
        except (QueueFullError, IdempotencyError):  # after another error it may be stored: a sweep knows later
            self.files.remove([file.name])
            raise
        if not done.created:
            self.files.remove([file.name])
        return done

    def check_room(self, owner: str, key: str | None, limits: Limits) -> None:
        """Raise QueueFullError if `submit` would; not for an idempotency key that is in use."""
        same = sa.and_(jobs.c.owner == owner, jobs.c.idempotency_key == key)
        with self._read() as connection:
            if key is None or connection.scalar(sa.select(jobs.c.id).where(same)) is None:
                statements.check_limits(connection, owner, limits)

    def find_by_key(self, owner: str, key: str, fingerprint: str) -> StoredJob | None:
        """The job that `submit` stored under an idempotency key, if it still exists.

        Raises IdempotencyError if the key belongs to another request.
        """
        with self._read() as connection:
            return statements.find_by_key(connection, owner, key, fingerprint)

    def get(self, job_id: str, owner: str | None = None) -> StoredJob:
        """One job; with `owner`, only if it is theirs. Raises UnknownJobError."""
        with self._read() as connection:
            return statements.to_job(statements.find_row(connection, job_id, owner))

    def list(
        self,
        owner: str | None = None,
        *,
        after: str | None = None,
        limit: int = 20,
        order: Order = "desc",
        status: Status | None = None,
    ) -> Page:
        """A page of jobs by age, newest first by default, starting after the id `after`. `limit` is 1 to 100."""
        limit = min(max(limit, 1), MAX_PAGE)
        query = statements.by_age(order, owner, status, after)
        with self._read() as connection:
            found = connection.execute(query.limit(limit + 1)).all()
        return Page(tuple(statements.to_job(row) for row in found[:limit]), len(found) > limit)

    def cancel(self, job_id: str, owner: str | None = None) -> StoredJob:
        """Cancel an open job at once; its worker notices at its next poll. A finished job is not changed.

        Raises UnknownJobError.
        """
        error = JobError(CANCELLED, "The job was cancelled.", "cancelled")
        with self._write() as connection:
            row = statements.find_row(connection, job_id, owner, lock=True)
            if row.status in OPEN_STATUSES:
                row = statements.update_row(connection, jobs.c.id == job_id, self._failed(error)) or row
        return statements.to_job(row)

    def delete(self, job_id: str, owner: str | None = None) -> StoredJob:
        """Remove a job in any state: its prompt's embeddings, its row, its files. Raises UnknownJobError.

        After a kill between row and files, `sweep` deletes the files. Files that a worker is still writing are deleted
        by that worker or by a sweep.
        """
        forget_prompts(self.files.folder, [self.get(job_id, owner)])
        with self._write() as connection:
            job = statements.to_job(statements.find_row(connection, job_id, owner, lock=True))
            rows = delete_rows(connection, jobs.c.id == job_id, self._clock())
        remove_files(self.files, rows)
        fold_log(self.database)
        return job

    def was_deleted(self, job_id: str) -> bool:
        """Whether the job was deleted within the last days. `get` does not prove it: an index may be damaged."""
        with self._read() as connection:
            return bool(statements.deleted_among(connection, [job_id]))

    # For workers.

    def claim(
        self, worker: str, lease_seconds: float, *, alone: bool = True, model: ModelId | None = None
    ) -> Lease | None:
        """Take the oldest queued job of the highest priority, or None. No other worker gets the same one.

        With `model`, only a job that was accepted for that model. Without `alone`, only a job that has not crashed: one
        that has must be its worker's only job, so that its next crash is not counted for another job.
        """
        if not self._has_queued():  # do not take the write lock while idle
            return None
        with self._write() as connection:
            first = statements.TAKE_FIRST if alone else statements.TAKE_FIRST_UNBLAMED
            which = statements.of_model(model)
            return statements.take(connection, first, worker, lease_seconds, self._clock(), **which)

    def other_models(self, model: ModelId) -> dict[ModelId, str]:
        """Models of queued jobs, except `model` and those of which a job runs; each with its oldest job's id."""
        with self._read() as connection:
            found = connection.execute(statements.OTHER_MODELS, statements.of_model(model)).all()
        return {ModelId(name, weights): oldest for name, weights, oldest in found}

    def refuse_model(self, model: ModelId, error: JobError) -> int:
        """Fail all queued jobs that were accepted for `model`, with `error`; returns how many."""
        which = sa.and_(jobs.c.status == "queued", jobs.c.model == model.name, jobs.c.model_hash == model.hash)
        with self._write() as connection:
            return connection.execute(sa.update(jobs).where(which).values(self._failed(error))).rowcount

    def renew(self, lease: Lease) -> None:
        """Increment the lease's heartbeat. Raises StaleLeaseError."""
        with self._write() as connection:
            statements.commit(connection, lease, {}, statements.BEAT)

    def check(self, lease: Lease) -> None:
        """Check that the lease is valid, without a write. Raises StaleLeaseError."""
        with self._read() as connection:
            if connection.scalar(statements.CHECK, statements.leased(lease)) is None:
                raise statements.stale(lease)

    def progress(self, lease: Lease, percent: float, phase: str, seconds_left: float | None = None) -> None:
        """Store the job's progress (0 to 100, never decreases) and renew the lease. Raises StaleLeaseError."""
        values = {"percent": min(max(percent, 0.0), 100.0), "phase": phase, "seconds_left": seconds_left}
        with self._write() as connection:
            statements.commit(connection, lease, values, statements.PROGRESS)

    def complete(self, lease: Lease, files: Sequence[OutputFile], report: Values | None = None) -> StoredJob:
        """Complete the job with its files, which must be on the disk already. Raises StaleLeaseError.

        It may be repeated after an error that leaves the outcome unknown.
        """
        now = self._clock()
        values = endings.completed([*files, *lease.job.inputs], report or {}, now, self._expiry(now))
        with self._write() as connection:
            row = statements.update_leased(connection, lease, values)
            if row is None:
                row = connection.execute(sa.select(jobs).where(jobs.c.id == lease.job.id)).one_or_none()
                if row is None or row.status != "completed" or row.token != lease.token:
                    raise statements.stale(lease)
                return statements.to_job(row)
            statements.count_stages(connection, max(0.0, row.started_at - row.created_at), report or {})
        return statements.to_job(row)

    def fail(self, lease: Lease, error: JobError) -> StoredJob:
        """Fail the job with an error. Raises StaleLeaseError."""
        with self._write() as connection:
            return statements.to_job(statements.commit(connection, lease, self._failed(error)))

    def release(self, lease: Lease) -> None:
        """Put the job back into the queue without counting a crash, for example while draining. Raises StaleLeaseError."""
        with self._write() as connection:
            statements.commit(connection, lease, endings.BACK_IN_THE_QUEUE)

    def lacks_loras(self, job: StoredJob) -> bool:
        """Whether other workers may have the job's LoRA, and this one has not. On one machine, all have the same."""
        return False

    def retry(self, lease: Lease, error: JobError, max_crashes: int) -> StoredJob:
        """Put the job back after an unexpected error, or fail it with that error. Raises StaleLeaseError.

        It fails after `max_crashes` consecutive attempts that did not get farther than the one before.
        """
        with self._write() as connection:
            row = connection.execute(statements.LOCK_LEASED, statements.leased(lease)).one_or_none()
            if row is None:
                raise statements.stale(lease)
            return statements.to_job(statements.commit(connection, lease, self._after_crash(row, error, max_crashes)))

    # For watchers.

    def pulses(self) -> tuple[Pulse, ...]:
        """All leases."""
        query = sa.select(jobs.c.id, jobs.c.worker, jobs.c.token, jobs.c.beat, jobs.c.lease_seconds)
        with self._read() as connection:
            found = connection.execute(query.where(jobs.c.status == "in_progress")).all()
        return tuple(Pulse(*row) for row in found)

    def recover(self, pulse: Pulse, max_crashes: int) -> StoredJob | None:
        """Take a job from a dead worker: put it back into the queue, or fail it after too many crashes.

        None if the lease changed since `pulse` was read, as its worker is alive. If the worker died together with its
        supervisor, as at a power cut, the job is probably not the cause: `endings.PATIENCE` times as many are allowed.
        """
        alone = outlived_by_supervisor(self.files.workers, pulse.worker)
        same = sa.and_(
            jobs.c.id == pulse.job_id,
            jobs.c.status == "in_progress",
            jobs.c.token == pulse.token,
            jobs.c.beat == pulse.beat,
        )
        error = JobError(WORKER_CRASHED, "The worker died each time it ran this job, at the same place.")
        with self._write() as connection:
            row = connection.execute(sa.select(jobs).where(same).with_for_update()).one_or_none()
            if row is None:
                return None
            row = statements.update_row(connection, same, self._after_crash(row, error, max_crashes, alone))
        return statements.to_job(row) if row is not None else None

    # Retention.

    def expire(self) -> int:
        """Delete expired jobs with their files, at most `retention.ROUND`; returns how many."""
        return self._retention.expire()

    def trim(self, max_bytes: int) -> int:
        """Delete the oldest finished jobs until published files fit into `max_bytes`, at most `retention.ROUND` jobs.

        Returns how many.
        """
        return self._retention.trim(max_bytes)

    def sweep(self, *, unknown_too: bool = False) -> int:
        """Remove files that no job owns, which a kill may have left; returns how many were removed.

        A call looks at some thousand files; while `sweeping`, there are more. Files of jobs that the database does not
        know are moved to the trash; if most files are of that kind, nothing is moved unless `unknown_too`.
        """
        try:
            check_pair(self.files, self.database)
        except ForeignDatabaseError as error:
            log.error("nothing is swept", reason=error.message)
            return 0
        self.files.discard_uploads()
        if not self.sweeping:
            fold_log(self.database)  # deletions during another connection's read are still in the log
        removed = sum(one.round(unknown_too=unknown_too) for one in self._sweepers if one.midway or not self.sweeping)
        if not self.sweeping:
            self._retention.forget_deleted()  # now that their files are gone
        return removed

    @property
    def sweeping(self) -> bool:
        """Whether the last call of `sweep` left files to look at for the next."""
        return any(one.midway for one in self._sweepers)

    # For metrics.

    def statistics(self, owner: str | None = None) -> Statistics:
        """The queue now, and the summed seconds of all completed jobs by stage; see `counts.count_jobs`."""
        with self._read() as connection:
            return count_jobs(connection, owner, self._clock())

    # Private.

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        self._presence.check()
        with (
            self.writers.entered() as until,
            self.database.connect().execution_options(**{SERIAL: until}) as connection,
            connection.begin(),
        ):
            self.writers.begun()
            yield connection
        self._presence.check()  # a write into a removed folder must not be acknowledged

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        self._presence.check()
        with self.database.connect() as connection, connection.begin():
            yield connection

    def _insert(
        self, new: NewJob, limits: Limits, job_id: str | None = None, files: Sequence[OutputFile] = ()
    ) -> Submitted:
        fingerprint = new.fingerprint or statements.fingerprint(new)
        with self._write() as connection:
            newest = connection.scalar(statements.NEWEST)  # its row lock serialises submissions on a database server
            known = statements.find_by_key(connection, new.owner, new.idempotency_key, fingerprint)
            if known is not None:
                return Submitted(known, created=False)
            statements.check_limits(connection, new.owner, limits)
            now = self._clock()
            job_id = job_id or statements.new_id(connection, newest, now)
            added = {"id": job_id, "fingerprint": fingerprint, "created_at": now}
            return Submitted(statements.insert(connection, new, files, added), created=True)

    def _has_queued(self) -> bool:
        with self._read() as connection:
            return connection.scalar(sa.select(jobs.c.id).where(jobs.c.status == "queued").limit(1)) is not None

    def _expiry(self, now: float) -> float | None:
        return None if self.retention_seconds is None else now + self.retention_seconds

    def _failed(self, error: JobError) -> Values:
        now = self._clock()
        return endings.failed(error, now, self._expiry(now))

    def _after_crash(self, row: "sa.Row[Any]", error: JobError, max_crashes: int, alone: bool = True) -> Values:
        return endings.after_crash(row, self._failed(error), max_crashes, alone)
