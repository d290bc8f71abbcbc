"""The job store's tables, and how those of an earlier version become today's."""

import time

import sqlalchemy as sa

from wanduet.errors import ConfigError
from wanduet.jobs.records import demand_of

SCHEMA_VERSION = 3
CREATE_ATTEMPTS = 5
SERIAL = "serial_until"  # a connection's option: its transactions write; until when SQLite's write lock is waited for

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

# How much published files take, and which are the oldest: of jobs that have files only.
_HAS_FILES = jobs.c.files_bytes > sa.literal_column("0")
jobs_with_files = sa.Index(
    "jobs_with_files", jobs.c.id, jobs.c.files_bytes, sqlite_where=_HAS_FILES, postgresql_where=_HAS_FILES
)

# Jobs that were deleted lately, whose files may be left by a kill or by a worker that still wrote.
deleted = sa.Table(
    "deleted_jobs",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("deleted_at", sa.Double, nullable=False),
    sa.Index("deleted_jobs_by_time", "deleted_at"),
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
    sa.Column("store_id", sa.String(64)),  # the id that is kept in the data folders of this database, too
)

STEPS = "steps"  # beside the stages: seconds of denoising, and how many steps they were
STAGE_NAMES = ("queue_s", "load_s", "encode_s", "denoise_s", "decode_s", "write_s", "total_s", STEPS)


def is_current(connection: sa.Connection) -> bool:
    """Whether the tables are there, as this version makes them. Raises ConfigError where a newer one made them."""
    if not sa.inspect(connection).has_table("state"):
        return False
    version = connection.scalar(sa.select(state.c.version))
    if version is not None and version > SCHEMA_VERSION:
        raise ConfigError(
            "A newer wanduet wrote this job database.", hint="Update wanduet, or use another data folder."
        )
    return version == SCHEMA_VERSION and not _missing_stages(connection)


def create_tables(database: sa.Engine, deadline: float) -> None:
    """Create what is missing, or bring it up to this version; gives up at `deadline` of the monotonic clock."""
    # Several processes may start at once. SQLite's write lock makes them queue up; on a server the loser of a race
    # fails on what the winner made, and finds it there when it looks again.
    attempts = 1 if database.dialect.name == "sqlite" else CREATE_ATTEMPTS
    for attempt in range(attempts):
        try:
            with database.connect().execution_options(**{SERIAL: deadline}) as connection, connection.begin():
                _create_missing(connection)
            return
        except sa.exc.DatabaseError:
            if attempt == attempts - 1:
                raise
            time.sleep(0.05 * (attempt + 1))


def _create_missing(connection: sa.Connection) -> None:
    known = sa.inspect(connection)
    added = ((jobs, "demand", _add_demand), (jobs, "model_hash", _add_model_hash), (state, "store_id", _add_store_id))
    for table, column, upgrade in added:
        if known.has_table(table.name) and column not in {one["name"] for one in known.get_columns(table.name)}:
            upgrade(connection)
    metadata.create_all(connection)
    jobs_with_files.create(connection, checkfirst=True)  # `create_all` adds no index to a table that is there
    if connection.scalar(sa.select(state.c.version)) is None:
        connection.execute(sa.insert(state).values(id=1, version=SCHEMA_VERSION))
    if not is_current(connection):
        connection.execute(sa.update(state).values(version=SCHEMA_VERSION))
    if missing := [{"name": name, "seconds": 0.0, "count": 0} for name in _missing_stages(connection)]:
        connection.execute(sa.insert(stages), missing)


def _missing_stages(connection: sa.Connection) -> list[str]:
    counted = set(connection.scalars(sa.select(stages.c.name)))
    return [name for name in STAGE_NAMES if name not in counted]


def _add_demand(connection: sa.Connection) -> None:
    """From version 1 to 2."""
    connection.execute(sa.text("ALTER TABLE jobs ADD COLUMN demand VARCHAR(96) NOT NULL DEFAULT ''"))
    next(index for index in jobs.indexes if index.name == "jobs_by_demand").create(connection)
    for job_id, request in connection.execute(sa.select(jobs.c.id, jobs.c.request)).all():
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(demand=demand_of(request)))


def _add_model_hash(connection: sa.Connection) -> None:
    """From version 2 to 3. Jobs from before have none: for them the model's name decides."""
    connection.execute(sa.text("ALTER TABLE jobs ADD COLUMN model_hash VARCHAR(64)"))


def _add_store_id(connection: sa.Connection) -> None:
    """From version 2 to 3."""
    connection.execute(sa.text("ALTER TABLE state ADD COLUMN store_id VARCHAR(64)"))
