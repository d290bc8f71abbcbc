"""Opens the job store's database such that a commit is on the disk, and maps driver errors to the store's errors.

SQLite and PostgreSQL differ only in their connections' settings; the statements are the same.
"""

import os
import sqlite3
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.pool import ConnectionPoolEntry

from wanduet.errors import ConfigError
from wanduet.folders import make_folder
from wanduet.jobs.records import StoreBrokenError, StoreDamagedError, StoreGoneError, StoreReadOnlyError
from wanduet.jobs.schema import SERIAL, create_tables, is_current

OPEN_SECONDS = 30.0  # how long opening waits for other processes that open the same database
LOCK_SECONDS = 5.0  # how long a statement waits for another process's transaction
_POSTGRES_DAMAGED = ("XX001", "XX002")  # data_corrupted, index_corrupted
_POSTGRES_READ_ONLY = ("25006", "42501")  # read_only_sql_transaction, insufficient_privilege
_POSTGRES_GONE = ("3D000", "3F000", "42P01")  # no such database, schema, table


def open_database(url: str, connections: int = 10) -> sa.Engine:
    """Connect, create missing tables, check their version. Raises ConfigError, StoreBrokenError.

    `url` is SQLAlchemy's: `sqlite:////folder/jobs.sqlite3`, `postgresql+psycopg://...`. `connections` is the pool size
    for a database server; SQLite's is fixed.
    """
    parsed = _parse(url)
    sqlite = parsed.get_backend_name() == "sqlite"
    database = _open_sqlite(parsed) if sqlite else _open_server(parsed, connections)
    event.listen(database, "handle_error", _name_error)
    try:
        with database.connect() as connection:  # reads only: does not wait for writers
            current = is_current(connection)
        if not current:
            create_tables(database, time.monotonic() + OPEN_SECONDS)
    except BaseException:
        database.dispose()
        raise
    return database


def sqlite_path(url: str) -> Path | None:
    """Return the file of a SQLite database; None for any other kind of database. Raises ConfigError."""
    parsed = _parse(url)
    if parsed.get_backend_name() != "sqlite":
        return None
    if not parsed.database or parsed.database == ":memory:":
        raise ConfigError("Jobs must be kept in a file.", hint="Example: sqlite:////data/jobs.sqlite3")
    is_uri = parsed.database.startswith("file:")
    return Path(unquote(urlsplit(parsed.database).path) if is_uri else parsed.database).absolute()


def public_name(url: str) -> str:
    """Return a database's address without its password and query."""
    return str(sqlite_path(url) or _parse(url).set(query={}).render_as_string(hide_password=True))


def _parse(url: str) -> sa.URL:
    try:
        return sa.make_url(url)
    except sa.exc.ArgumentError:
        raise ConfigError(
            "The database's address is not valid.", hint="Example: sqlite:////data/jobs.sqlite3"
        ) from None


def _open_server(url: sa.URL, connections: int) -> sa.Engine:
    database = sa.create_engine(url, pool_size=connections, pool_timeout=LOCK_SECONDS)
    if database.dialect.name == "postgresql":
        event.listen(database, "connect", _prepare_postgres)
    return database


def _prepare_postgres(connection: Any, _: ConnectionPoolEntry) -> None:
    before, connection.autocommit = connection.autocommit, True  # in a transaction, a rollback would undo the setting
    with connection.cursor() as cursor:
        cursor.execute(f"SET lock_timeout = {int(LOCK_SECONDS * 1000)}")
    connection.autocommit = before


def _open_sqlite(url: sa.URL) -> sa.Engine:
    path = sqlite_path(url.render_as_string(hide_password=False))
    assert path is not None
    is_uri = str(url.database).startswith("file:")
    try:
        make_folder(path.parent, 0o700)
        if not is_uri and not path.exists():
            path.touch(0o600)  # it contains prompts; SQLite gives the log file the same mode
    except OSError as error:
        if not path.parent.is_dir():
            raise ConfigError(
                f"The job database {path} cannot be made: {error.strerror or error}.",
                hint="Give another folder with --data-dir, or another database with --database-url.",
            ) from error
    database = sa.create_engine(
        url,
        connect_args={"timeout": LOCK_SECONDS, "check_same_thread": False},
        pool_size=8,
        max_overflow=56,
        pool_timeout=LOCK_SECONDS,
    )
    event.listen(database, "connect", _prepare_sqlite)
    event.listen(database, "begin", _begin_sqlite)
    return database


def _prepare_sqlite(connection: Any, _: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # `_begin_sqlite` begins transactions, not the driver
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {int(LOCK_SECONDS * 1000)}")
    _switch_to_wal(cursor)
    cursor.execute("PRAGMA synchronous = FULL")  # WAL's default can lose the last commits at a power cut
    cursor.execute("PRAGMA foreign_keys = ON")
    # Jobs are read by key and the system caches the file's pages. SQLite's default of 2 MB a connection would only be
    # filled by sweeps, connection by connection, which looks like a leak.
    cursor.execute("PRAGMA cache_size = -256")
    cursor.execute("PRAGMA secure_delete = ON")  # overwrite deleted prompts instead of only freeing their pages
    cursor.close()


def fold_log(database: sa.Engine) -> None:
    """Move SQLite's write-ahead log into the database file and truncate it, so that no deleted data remains in it.

    Does nothing while another connection reads or writes; a later call, or SQLite's own checkpoints, will do it.
    """
    if database.dialect.name != "sqlite":
        return
    with (
        suppress(sqlite3.Error),
        closing(database.raw_connection()) as connection,
        closing(connection.cursor()) as cursor,
    ):
        cursor.execute("PRAGMA busy_timeout = 100")
        try:
            cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            cursor.execute(f"PRAGMA busy_timeout = {int(LOCK_SECONDS * 1000)}")


def find_damage(connection: sa.Connection) -> str | None:
    """Return the first fault in a SQLite file, indexes included; None if it is sound. Reads the whole file."""
    if connection.dialect.name != "sqlite":
        return None
    found = str(connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar())
    return None if found == "ok" else found


def _switch_to_wal(cursor: Any) -> None:
    """Enable the write-ahead log. Retries by itself: SQLite's busy timeout does not apply while the file is created."""
    give_up = time.monotonic() + OPEN_SECONDS
    while True:
        try:
            if cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > give_up:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: sa.Connection) -> None:
    options = connection.get_execution_options()
    if SERIAL not in options:
        connection.exec_driver_sql("BEGIN")
        return
    # Take the write lock now, as a read transaction may fail to become a writer; wait until the caller's deadline.
    left = max(0.0, options[SERIAL] - time.monotonic())
    connection.exec_driver_sql(f"PRAGMA busy_timeout = {int(left * 1000)}")
    try:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    finally:
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {int(LOCK_SECONDS * 1000)}")


def _name_error(context: ExceptionContext) -> StoreBrokenError | None:
    """Return the store's error for a driver error that an operator must fix; None leaves the driver error as it is."""
    error = context.original_exception
    url = context.engine.url if context.engine is not None else None
    name = "" if url is None else public_name(url.render_as_string(hide_password=False))
    if isinstance(error, sqlite3.Error):
        return _name_sqlite_error(error, Path(name))
    state = getattr(error, "sqlstate", None)
    if state in _POSTGRES_DAMAGED:
        return _damaged(name)
    if state in _POSTGRES_READ_ONLY:
        return StoreReadOnlyError(
            f"The job database {name} may not be written.", hint="Give its user the right to, or name the primary."
        )
    if state in _POSTGRES_GONE:
        return _gone(name)
    return None


def _name_sqlite_error(error: sqlite3.Error, path: Path) -> StoreBrokenError | None:
    code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return _damaged(str(path))
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return StoreReadOnlyError(
            f"The job database {path} cannot be written: it, its folder or its disk is read-only.",
            hint="Give this user the right to write there, or use another data folder.",
        )
    if code == sqlite3.SQLITE_CANTOPEN:
        if not path.exists():
            return _gone(str(path))
        if not path.is_file() or not os.access(path, os.R_OK | os.W_OK) or not os.access(path.parent, os.W_OK):
            return StoreReadOnlyError(
                f"The job database {path} cannot be opened: it is no file, or this user may not read and write it.",
                hint="Give this user the right to, or use another data folder.",
            )
        return None  # too many files are open, for example
    if code == sqlite3.SQLITE_ERROR and str(error).startswith("no such table"):
        return _gone(str(path))
    return None


def _damaged(name: str) -> StoreBrokenError:
    return StoreDamagedError(
        f"The job database {name} is damaged, or is no job database. No file of a job was touched.",
        hint="Stop wanduet, then restore the database from a backup, or save what can be read with `sqlite3 FILE .recover`.",
    )


def _gone(name: str) -> StoreBrokenError:
    return StoreGoneError(
        f"The job database {name} is gone, or its tables are.", hint="Put it back, and start wanduet again."
    )
