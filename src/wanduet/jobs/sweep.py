"""Removes files that no job owns, left by kills between two steps and by workers that lost their jobs.

Files of jobs that the database records as deleted or finished are deleted. Files of unknown jobs may mean that the
database is damaged or not the folder's own: they are moved to the trash, and only if they are few beside the files of
known jobs. Before a file is removed, its job is looked up by a scan of the table, as indexes may be damaged.
"""

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from itertools import islice

import sqlalchemy as sa
import structlog

from wanduet.jobs import statements
from wanduet.jobs.database import find_damage
from wanduet.jobs.places import TRASH_DAYS, Entry, Place
from wanduet.jobs.records import INPUT, submitted_at

log = structlog.get_logger(__name__)

BATCH = 300  # entries that are looked up at once
ROUND_BATCHES = 10  # batches in a round, so that a round does not delay the queue
LARGEST_HEAP = 500  # entries that one pass removes
SPARED = 20  # unknown entries that are moved even if no entry is known
ARRIVAL_SECONDS = 3600.0  # for so long, an input of an unknown job may be one whose row is about to be stored

Read = Callable[[], AbstractContextManager[sa.Connection]]


class Sweeper:
    """Sweeps one place. Any thread may call `round`, which continues where the last call ended."""

    def __init__(self, place: Place, read: Read, clock: Callable[[], float]) -> None:
        """`read` opens a transaction of the job database; `clock` returns Unix seconds."""
        self._place = place
        self._read = read
        self._clock = clock
        self._guard = threading.Lock()
        self._pass: Iterator[int | None] | None = None

    @property
    def midway(self) -> bool:
        """Whether the last round did not reach the place's last entry."""
        return self._pass is not None

    def round(self, *, unknown_too: bool = False) -> int:
        """Look at some thousand entries; after the last one, remove those that no job owns. Returns how many.

        `unknown_too`: also if the database does not know most of the entries.
        """
        with self._guard:
            self._pass = self._pass or self._look(unknown_too)
            try:
                found = next(self._pass)
            except BaseException:
                self._pass = None
                raise
            if found is not None:
                self._pass = None
            return found or 0

    def _look(self, unknown_too: bool) -> Iterator[int | None]:
        """Run one pass over the place; yield None after each round, and at the end the number of removed entries."""
        entries = iter(self._place.entries())
        unwanted: list[Entry] = []
        known = unknown = batches = 0
        while batch := tuple(islice(entries, BATCH)):
            if batches and batches % ROUND_BATCHES == 0:
                yield None
            batches += 1
            ids = {job_id for job_id, _ in batch}
            with self._read() as connection:
                wanted = statements.wanted_names(connection, ids)
                gone = statements.deleted_among(connection, ids - wanted.keys())
            batch = tuple(one for one in batch if one[0] in wanted or one[0] in gone or not self._arrives(one))
            known += sum(job_id in wanted for job_id, _ in batch)
            unknown += sum(job_id not in wanted and job_id not in gone for job_id, _ in batch)
            unwanted += [one for one in batch if _is_unwanted(one, wanted)][: LARGEST_HEAP - len(unwanted)]
        removed = self._take(unwanted, known, unknown, unknown_too) if unwanted else 0
        self._place.empty_trash(TRASH_DAYS)
        yield removed

    def _arrives(self, entry: Entry) -> bool:
        """Return whether an entry may be an input that was stored just now, before its job."""
        is_input = entry[1].startswith(f"{entry[0]}.{INPUT}")  # or a partial file of one
        return is_input and self._clock() - submitted_at(entry[0]) < ARRIVAL_SECONDS

    def _take(self, unwanted: list[Entry], known: int, unknown: int, unknown_too: bool) -> int:
        if unknown > known + SPARED and not unknown_too:
            log.error(
                "nothing is swept: the job database does not know most of the jobs whose files are here",
                place=self._place.name,
                known=known,
                unknown=unknown,
                hint="Is it the right database? `wanduet jobs adopt` moves the files to the trash.",
            )
            return 0
        ids = {job_id for job_id, _ in unwanted}
        with self._read() as connection:
            if (damage := find_damage(connection)) is not None:
                log.error("nothing is swept: the job database is damaged", place=self._place.name, damage=damage)
                return 0
            wanted = statements.wanted_names(connection, ids, by_scan=True)
            gone = statements.deleted_among(connection, ids - wanted.keys())
        unwanted = [one for one in unwanted if _is_unwanted(one, wanted)]
        sure = [one for one in unwanted if one[0] in gone or (one[0] in wanted and one[0] == one[1])]
        removed = self._place.remove(sure)
        left = [one for one in unwanted if one not in set(sure)]
        if not left:
            return removed
        moved, where = self._place.throw_away(left)
        if moved:
            log.warning("files that no job owns went to the trash", count=moved, trash=where, kept_days=TRASH_DAYS)
        return removed + moved


def _is_unwanted(entry: Entry, wanted: dict[str, Collection[str] | None]) -> bool:
    names = wanted.get(entry[0], ())
    return names is not None and entry[1] not in names
