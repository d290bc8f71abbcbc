"""The job store's tables, and how a database is opened so that a commit means "on disk".

The same statements run on SQLite and PostgreSQL; only the connection's settings differ.
"""

import sqlite3
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.pool import ConnectionPoolEntry

from wanduet.errors import ConfigError
from wanduet.jobs.records import demand_of

SCHEMA_VERSION = 2
BUSY_SECONDS = 30.0  # how long a statement waits for another process's transaction
CREATE_ATTEMPTS = 5
WRITE = {"sqlite_begin": "BEGIN IMMEDIATE"}  # take the write lock at once: no upgrade can fail half-way

metadata = sa.MetaData()

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),  # grows with every submission: the queue's and lists' order
    sa.Column("owner", sa.String(128), nullable=False),
    sa.Column("idempotency_key", sa.String(255)),
    sa.Column("fingerprint", sa.String(64), nullable=False),  # of what was asked for under that key
    sa.Column("model", sa.String(255), nullable=False),
    sa.Column("model_hash", sa.String(64)),  # of its weights; none where nobody said
    sa.Column("request", sa.JSON, nullable=False),
    sa.Column("demand", sa.String(96), nullable=False, server_default=""),  # of the request: see `demand_of`
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("progress", sa.Double, nullable=False, server_default="0"),
    sa.Column("phase", sa.String(32), nullable=False, server_default=""),
    sa.Column("seconds_left", sa.Double),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("started_at", sa.Double),
    sa.Column("completed_at", sa.Double),
    sa.Column("expires_at", sa.Double),
    sa.Column("error_code", sa.String(64)),
    sa.Column("error_message", sa.Text),
    sa.Column("error_type", sa.String(64)),
    sa.Column("error_param", sa.String(255)),
    sa.Column("remixed_from", sa.String(64)),
    sa.Column("files", sa.JSON, nullable=False),
    sa.Column("files_bytes", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("report", sa.JSON, nullable=False),
    sa.Column("worker", sa.String(255)),
    sa.Column("token", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("beat", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("lease_seconds", sa.Double, nullable=False, server_default="0"),
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("crashes", sa.Integer, nullable=False, server_default="0"),
    sa.Column("crash_progress", sa.Double, nullable=False, server_default="-1"),
    sa.UniqueConstraint("owner", "idempotency_key", name="jobs_idempotency"),
    sa.CheckConstraint("status IN ('queued', 'in_progress', 'completed', 'failed')", name="jobs_status"),
    sa.Index("jobs_by_queue", "status", "priority", "id"),
    sa.Index("jobs_by_demand", "status", "owner", "demand", "priority", "id"),
    sa.Index("jobs_by_owner", "owner", "id"),
    sa.Index("jobs_by_expiry", "expires_at"),
)

# Seconds by stage of all completed jobs, which a metric needs to survive the deletion of the jobs.
stages = sa.Table(
    "stages",
    metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("seconds", sa.Double, nullable=False),
    sa.Column("count", sa.BigInteger, nullable=False),
)

# The first id of the next submission must be greater than every id ever given, deleted jobs included;
# `version` refuses a database that a newer wanduet wrote. One row.
state = sa.Table(
    "state",
    metadata,
    sa.Column("id", sa.Integer, sa.CheckConstraint("id = 1"), primary_key=True, autoincrement=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("newest_id", sa.String(64)),
)

STEPS = "steps"  # beside the stages: seconds of denoising, and how many steps they were
STAGE_NAMES = ("queue_s", "load_s", "encode_s", "denoise_s", "decode_s", "write_s", "total_s", STEPS)


def open_database(url: str, connections: int = 10) -> sa.Engine:
    """Connect, create the tables where they are missing, check their version. Raises ConfigError.

    `url` is SQLAlchemy's: `sqlite:////folder/jobs.sqlite3`, `postgresql+psycopg://...`; of `connections` to a
    server at most so many are kept open.
    """
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise ConfigError(
            "The database's address is not valid.", hint="Example: sqlite:////data/jobs.sqlite3"
        ) from None
    sqlite = parsed.get_backend_name() == "sqlite"
    database = _open_sqlite(parsed) if sqlite else sa.create_engine(parsed, pool_size=connections)
    try:
        _create_tables(database)
    except BaseException:
        database.dispose()
        raise
    return database


def _open_sqlite(url: sa.URL) -> sa.Engine:
    if not url.database or url.database == ":memory:":
        raise ConfigError("Jobs must be kept in a file.", hint="Example: sqlite:////data/jobs.sqlite3")
    path = Path(url.database).absolute()
    path.parent.mkdir(0o700, parents=True, exist_ok=True)
    if not path.exists() and not url.database.startswith("file:"):
        with suppress(OSError):  # SQLite will tell
            path.touch(0o600)  # it holds prompts; the log gets the same mode
    database = sa.create_engine(
        url, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False}, pool_size=8, max_overflow=56
    )
    event.listen(database, "connect", _prepare_sqlite)
    event.listen(database, "begin", _begin_sqlite)
    return database


def _prepare_sqlite(connection: Any, _: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # transactions begin where `_begin_sqlite` says, not where the driver guesses
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
    _switch_to_wal(cursor)
    cursor.execute("PRAGMA synchronous = FULL")  # WAL's default would lose the last commits at a power cut
    cursor.execute("PRAGMA foreign_keys = ON")
    # Jobs are read by key, and the system keeps the file's pages: SQLite's own 2 MB for each connection would only be
    # filled again and again by the sweeps, until all of it looks like a leak.
    cursor.execute("PRAGMA cache_size = -256")
    cursor.execute("PRAGMA secure_delete = ON")  # a deleted prompt is overwritten, not only let go
    cursor.close()


def fold_log(database: sa.Engine) -> None:
    """Empty SQLite's log into the database file, so that the log holds nothing that was deleted.

    If somebody reads or writes just now, that is left to a later deletion, or to the log's own turn.
    """
    if database.dialect.name != "sqlite":
        return
    connection = database.raw_connection()
    cursor = connection.cursor()
    try:
        cursor.execute("PRAGMA busy_timeout = 100")
        cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    except sqlite3.OperationalError:
        pass
    finally:
        cursor.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
        cursor.close()
        connection.close()


def _switch_to_wal(cursor: Any) -> None:
    """Turn the log on; SQLite's busy timeout does not cover this one when several processes make the file."""
    give_up = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > give_up:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: sa.Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("sqlite_begin", "BEGIN"))


def _create_tables(database: sa.Engine) -> None:
    # Several processes may start at once. On SQLite the write lock puts them in a row; elsewhere the loser
    # of a race fails on what the winner made, and finds it there when it looks again.
    attempts = 1 if database.dialect.name == "sqlite" else CREATE_ATTEMPTS
    for attempt in range(attempts):
        try:
            with database.connect().execution_options(**WRITE) as connection, connection.begin():
                _create_missing(connection)
            return
        except sa.exc.DatabaseError:
            if attempt == attempts - 1:
                raise
            time.sleep(0.05 * (attempt + 1))


def _create_missing(connection: sa.Connection) -> None:
    known = sa.inspect(connection)
    if known.has_table("jobs") and "demand" not in {column["name"] for column in known.get_columns("jobs")}:
        _add_demand(connection)
    if known.has_table("jobs") and "model_hash" not in {column["name"] for column in known.get_columns("jobs")}:
        connection.execute(sa.text("ALTER TABLE jobs ADD COLUMN model_hash VARCHAR(64)"))  # older programs leave it out
    metadata.create_all(connection)
    version = connection.scalar(sa.select(state.c.version))
    if version is None:
        connection.execute(sa.insert(state).values(id=1, version=SCHEMA_VERSION))
    elif version > SCHEMA_VERSION:
        raise ConfigError(
            "A newer wanduet wrote this job database.", hint="Update wanduet, or use another data folder."
        )
    counted = set(connection.scalars(sa.select(stages.c.name)))
    if missing := [{"name": name, "seconds": 0.0, "count": 0} for name in STAGE_NAMES if name not in counted]:
        connection.execute(sa.insert(stages), missing)


def _add_demand(connection: sa.Connection) -> None:
    """From version 1 to 2."""
    connection.execute(sa.text("ALTER TABLE jobs ADD COLUMN demand VARCHAR(96) NOT NULL DEFAULT ''"))
    next(index for index in jobs.indexes if index.name == "jobs_by_demand").create(connection)
    for job_id, request in connection.execute(sa.select(jobs.c.id, jobs.c.request)).all():
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(demand=demand_of(request)))
    connection.execute(sa.update(state).values(version=2))
