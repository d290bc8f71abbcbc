"""The job store's tables, and migrations from earlier versions."""

import time

import sqlalchemy as sa

from wanduet.errors import ConfigError
from wanduet.jobs.records import demand_of

SCHEMA_VERSION = 3
CREATE_ATTEMPTS = 5
SERIAL = "serial_until"  # execution option of a writing connection: the monotonic deadline for SQLite's write lock

metadata = sa.MetaData()

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),  # grows with each submission; orders the queue and lists
    sa.Column("owner", sa.String(128), nullable=False),
    sa.Column("idempotency_key", sa.String(255)),
    sa.Column("fingerprint", sa.String(64), nullable=False),  # digest of the request under that key
    sa.Column("model", sa.String(255), nullable=False),
    sa.Column("model_hash", sa.String(64)),  # of its weights; null if not known
    sa.Column("request", sa.JSON, nullable=False),
    sa.Column("demand", sa.String(96), nullable=False, server_default=""),  # see `records.demand_of`
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

# Total size of published files, and the oldest of them: only jobs that have files.
_HAS_FILES = jobs.c.files_bytes > sa.literal_column("0")
jobs_with_files = sa.Index(
    "jobs_with_files", jobs.c.id, jobs.c.files_bytes, sqlite_where=_HAS_FILES, postgresql_where=_HAS_FILES
)

# Recently deleted jobs, whose files may still exist after a kill, or because a worker was still writing them.
deleted = sa.Table(
    "deleted_jobs",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("deleted_at", sa.Double, nullable=False),
    sa.Index("deleted_jobs_by_time", "deleted_at"),
)

# Requests to send when a job has ended, see `webhooks.WebhookSender`.
webhooks = sa.Table(
    "webhooks",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("job", sa.String(64), sa.ForeignKey(jobs.c.id, ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("tries", sa.Integer, nullable=False, server_default="0"),
    sa.Column("next_at", sa.Double, nullable=False, server_default="0"),  # Unix seconds
)

# Summed seconds by stage of all completed jobs, for metrics; kept when the jobs are deleted.
stages = sa.Table(
    "stages",
    metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("seconds", sa.Double, nullable=False),
    sa.Column("count", sa.BigInteger, nullable=False),
)

# One row. `newest_id`: a new id must be greater than all earlier ones, deleted jobs' included. `version`: a database of
# a newer wanduet is refused.
state = sa.Table(
    "state",
    metadata,
    sa.Column("id", sa.Integer, sa.CheckConstraint("id = 1"), primary_key=True, autoincrement=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("newest_id", sa.String(64)),
    sa.Column("store_id", sa.String(64)),  # also stored in the data folders of this database
)

STEPS = "steps"  # an extra row: seconds of denoising, and the number of steps
STAGE_NAMES = ("queue_s", "load_s", "encode_s", "denoise_s", "decode_s", "write_s", "total_s", STEPS)


def is_current(connection: sa.Connection) -> bool:
    """Return whether the tables exist in this version's form. Raises ConfigError if a newer version made them."""
    if not sa.inspect(connection).has_table("state"):
        return False
    version = connection.scalar(sa.select(state.c.version))
    if version is not None and version > SCHEMA_VERSION:
        raise ConfigError(
            "A newer wanduet wrote this job database.", hint="Update wanduet, or use another data folder."
        )
    # Added since without a new version, as earlier versions do without them.
    return (
        version == SCHEMA_VERSION
        and sa.inspect(connection).has_table(webhooks.name)
        and not _missing_stages(connection)
    )


def create_tables(database: sa.Engine, deadline: float) -> None:
    """Create missing tables, migrate old ones; gives up at `deadline` of the monotonic clock."""
    # Several processes may start at once. SQLite's write lock serialises them; on a server the loser of the race fails
    # because the tables exist, and finds them when it retries.
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
    jobs_with_files.create(connection, checkfirst=True)  # `create_all` adds no index to an existing table
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
    """From version 2 to 3. Earlier jobs have no hash; only the model's name is compared for them."""
    connection.execute(sa.text("ALTER TABLE jobs ADD COLUMN model_hash VARCHAR(64)"))


def _add_store_id(connection: sa.Connection) -> None:
    """From version 2 to 3."""
    connection.execute(sa.text("ALTER TABLE state ADD COLUMN store_id VARCHAR(64)"))
