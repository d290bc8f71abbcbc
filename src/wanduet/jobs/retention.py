"""Deletes finished jobs that are expired, or whose files exceed the disk limit, up to `ROUND` at a time.

A round is one short transaction that deletes the jobs and records their ids as deleted; then their files are deleted.
After a kill in between, a sweep finds the files and knows from the ids that they are not needed.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate, takewhile
from typing import Any

import sqlalchemy as sa

from wanduet.jobs.database import fold_log
from wanduet.jobs.files import JobFiles
from wanduet.jobs.places import TRASH_DAYS
from wanduet.jobs.prompts import PromptIndex
from wanduet.jobs.records import OPEN_STATUSES
from wanduet.jobs.schema import deleted, jobs

ROUND = 200  # jobs that are deleted at once
REMEMBERED_SECONDS = 86400 * TRASH_DAYS  # after which the id of a deleted job is forgotten

Transaction = Callable[[], AbstractContextManager[sa.Connection]]

_CLOSED = jobs.c.status.not_in(OPEN_STATUSES)
_HAS_FILES = jobs.c.files_bytes > sa.literal_column("0")  # literally the index's condition, so that the index is used


class Retention:
    """Deletes finished jobs of one store. `transactions` open a read and a write; `clock` returns Unix seconds."""

    def __init__(
        self,
        files: JobFiles,
        database: sa.Engine,
        transactions: tuple[Transaction, Transaction],
        clock: Callable[[], float],
    ) -> None:
        self._files = files
        self._database = database
        self._read, self._write = transactions
        self._clock = clock
        self._prompts = PromptIndex(files.folder)

    def expire(self) -> int:
        """Delete expired jobs, at most `ROUND`; return how many were deleted."""
        query = sa.select(jobs.c.id).where(jobs.c.expires_at <= self._clock(), _CLOSED)
        with self._read() as connection:
            ids = connection.scalars(query.order_by(jobs.c.expires_at).limit(ROUND)).all()
        return self.delete(ids)

    def trim(self, max_bytes: int) -> int:
        """Delete the oldest finished jobs until all files fit into `max_bytes`, at most `ROUND`; return how many."""
        with self._read() as connection:
            total = connection.scalar(sa.select(sa.func.sum(jobs.c.files_bytes)).where(_HAS_FILES)) or 0
            excess = total - max_bytes
            query = sa.select(jobs.c.id, jobs.c.files_bytes).where(_HAS_FILES, _CLOSED).order_by(jobs.c.id).limit(ROUND)
            rows = connection.execute(query).all() if excess > 0 else []
        before = accumulate((row.files_bytes for row in rows), initial=0)
        over = takewhile(lambda one: one[1] < excess, zip(rows, before, strict=False))
        return self.delete([row.id for row, _ in over])

    def delete(self, ids: Sequence[str]) -> int:
        """Delete finished jobs with their files and prompts; return how many of them existed."""
        if not ids:
            return 0
        with self._read() as connection:
            requests = connection.scalars(sa.select(jobs.c.request).where(jobs.c.id.in_(ids), _CLOSED)).all()
        self._prompts.forget(requests)
        if len(ids) < ROUND:  # the last round for now
            self._prompts = PromptIndex(self._files.folder)
        with self._write() as connection:
            rows = delete_rows(connection, sa.and_(jobs.c.id.in_(ids), _CLOSED), self._clock())
        remove_files(self._files, rows)
        if rows:
            fold_log(self._database)
        return len(rows)

    def forget_deleted(self) -> int:
        """Delete the records of jobs deleted long ago, at most `ROUND`; return how many."""
        long_ago = self._clock() - REMEMBERED_SECONDS
        some = sa.select(deleted.c.id).where(deleted.c.deleted_at < long_ago).limit(ROUND)
        with self._read() as connection:
            ids = connection.scalars(some).all()
        if ids:
            with self._write() as connection:
                connection.execute(sa.delete(deleted).where(deleted.c.id.in_(ids)))
        return len(ids)


def delete_rows(connection: sa.Connection, which: sa.ColumnElement[bool], now: float) -> "Sequence[sa.Row[Any]]":
    """Delete jobs and record their ids as deleted; return the columns that `remove_files` needs."""
    needed = (jobs.c.id, jobs.c.status, jobs.c.files, jobs.c.attempts, jobs.c.token)
    gone: sa.Executable = sa.delete(jobs).where(which).returning(*needed)
    rows = connection.execute(gone).all()
    if rows:
        connection.execute(sa.insert(deleted), [{"id": row.id, "deleted_at": now} for row in rows])
    return rows


def remove_files(files: JobFiles, rows: "Sequence[sa.Row[Any]]") -> None:
    """Delete the files of deleted jobs. Files that a worker still writes are deleted by that worker or by a sweep."""
    files.remove([file["name"] for row in rows for file in row.files])
    files.remove_older_of({row.id: row.token for row in rows if row.attempts > 1})
    for row in rows:
        if row.status != "in_progress":
            files.discard_work(row.id)
