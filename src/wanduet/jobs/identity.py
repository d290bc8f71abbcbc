"""Pairs a data folder with its database by an id that is stored in both.

A sweep removes files that the database does not know. With a foreign database that would be all files, so a folder and
a database are opened together only if their ids match, or if the folder is new.
"""

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import sqlalchemy as sa
import structlog

from wanduet.jobs.database import OPEN_SECONDS, open_database, public_name, sqlite_path
from wanduet.jobs.files import JobFiles
from wanduet.jobs.places import Mark, Place, UnreachablePlaceError
from wanduet.jobs.records import ForeignDatabaseError
from wanduet.jobs.schema import SERIAL, jobs, state

log = structlog.get_logger(__name__)

_LOOKED_AT = 3000  # entries of a place that are looked up in a database
_BATCH = 300


def open_paired(files: JobFiles, url: str, connections: int) -> sa.Engine:
    """Open a folder's database and pair them if new. Raises ForeignDatabaseError, ConfigError, OutputError."""
    _refuse_missing(files, url)
    database = open_database(url, connections)
    try:
        check_pair(files, database)
    except UnreachablePlaceError as error:
        log.warning("whose files these are is seen later, before any is swept", reason=error.message)
    except BaseException:
        database.dispose()
        raise
    return database


def check_pair(files: JobFiles, database: sa.Engine) -> None:
    """Check that files and database are paired. Raises ForeignDatabaseError, OutputError."""
    with database.connect() as connection:
        ours = connection.scalar(sa.select(state.c.store_id))
    if ours is not None and all(mark is not None and mark.id == ours for mark in (one.mark() for one in files.places)):
        return
    name = public_name(database.url.render_as_string(hide_password=False))
    ours = ours or _give_id(files, database, name)
    for place in files.places:
        mark = place.mark()
        if mark is None:
            with database.connect() as connection:
                if _knows(connection, place) is False:
                    raise _unknown_files(place, name)
            mark = place.set_mark(Mark(ours, name))
        if mark.id != ours:
            raise _foreign(place, mark.database, name)


def take_over(files: JobFiles, url: str) -> None:
    """Pair files with a database, whichever database they were paired with."""
    database = open_database(url)
    try:
        name = public_name(url)
        with _writing(database) as connection:
            ours = connection.scalar(sa.select(state.c.store_id)) or secrets.token_hex(16)
            connection.execute(sa.update(state).values(store_id=ours))
        for place in files.places:
            place.set_mark(Mark(ours, name), replace=True)
    finally:
        database.dispose()


def _give_id(files: JobFiles, database: sa.Engine, name: str) -> str:
    """Give a database its id: its folder's if it knows the jobs whose files are there, otherwise a new one."""
    with _writing(database) as connection:  # if two processes open it at once, the second finds the first one's id
        found: str | None = connection.scalar(sa.select(state.c.store_id))
        if found is not None:
            return found
        for place in files.places:
            mark, knows = place.mark(), _knows(connection, place)
            if mark is None and knows is False:
                raise _unknown_files(place, name)
            if mark is not None:
                # For example a backup from before ids existed. An empty database is not one.
                if not knows or found not in (None, mark.id):
                    raise _foreign(place, mark.database, name)
                found = mark.id
        found = found or secrets.token_hex(16)
        connection.execute(sa.update(state).values(store_id=found))
    return found


def _knows(connection: sa.Connection, place: Place) -> bool | None:
    """Return whether a database knows most of the jobs whose files are in a place; None if there are no files."""
    ids = iter({job_id for job_id, _ in islice(place.entries(), _LOOKED_AT)})
    known = unknown = 0
    while batch := list(islice(ids, _BATCH)):
        found = len(connection.scalars(sa.select(jobs.c.id).where(jobs.c.id.in_(batch))).all())
        known, unknown = known + found, unknown + len(batch) - found
    return None if not known + unknown else known >= max(unknown, 1)


def _refuse_missing(files: JobFiles, url: str) -> None:
    """Raise if the database file is missing but the folder has files, before an empty database is created there."""
    path = sqlite_path(url)
    if path is None or path.exists():
        return
    for place in files.places:
        mark = place.mark()
        if mark is not None or next(place.entries(), None) is not None:
            raise ForeignDatabaseError(
                f"The job database {path} does not exist, but {place.name} holds the files of"
                f" {'another one' if mark is None else mark.database}.",
                hint=_HINT,
            )


@contextmanager
def _writing(database: sa.Engine) -> Iterator[sa.Connection]:
    options = {SERIAL: time.monotonic() + OPEN_SECONDS}
    with database.connect().execution_options(**options) as connection, connection.begin():
        connection.execute(sa.select(state.c.id).with_for_update())
        yield connection


_HINT = (
    "Name the folder's own database with --database-url, or put it back where it was, or use another --data-dir."
    " `wanduet jobs adopt` gives the folder to this database; files that it does not know then go to the folder's trash."
)


def _foreign(place: Place, theirs: str, ours: str) -> ForeignDatabaseError:
    return ForeignDatabaseError(
        f"The data folder {place.name} belongs to another job database ({theirs}) than {ours}.", hint=_HINT
    )


def _unknown_files(place: Place, ours: str) -> ForeignDatabaseError:
    return ForeignDatabaseError(
        f"The data folder {place.name} holds files of jobs that the database {ours} does not know.", hint=_HINT
    )
