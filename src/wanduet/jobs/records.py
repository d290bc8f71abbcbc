"""What the job store speaks in: jobs, leases, errors. Plain frozen values; nothing here touches a database."""

import re
import secrets
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from sqlalchemy.exc import SQLAlchemyError

from wanduet.errors import ConfigError, WanduetError

Status = Literal["queued", "in_progress", "completed", "failed"]
Order = Literal["asc", "desc"]
OPEN_STATUSES: tuple[Status, ...] = ("queued", "in_progress")
MAX_PAGE = 100  # jobs in one answer of `JobStore.list`
CANCELLED = "cancelled"
WORKER_CRASHED = "worker_crashed"
MODEL_CHANGED = "model_changed"
WAITING = "waiting"  # the phase of a queued job that nobody takes; its report says why under the same name
DECODE = "decode:"  # begins the demand of a job whose latents are kept, and only their decode is left to do

_ID = re.compile(r"video_[0-9a-f]{12}[0-9a-f]{20}")


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed, in the wire's words: a stable `code`, a sentence, a class of errors, a field if any."""

    code: str
    message: str
    type: str = "server_error"
    param: str | None = None


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file of a finished job: `name` is the server's own, inside the videos folder; `index` the video's number."""

    variant: str
    index: int
    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class StoredJob:
    """A job as it stands in the store. Times are Unix seconds of the wall clock, for people only."""

    id: str
    owner: str
    model: str
    request: dict[str, Any]
    status: Status
    priority: int = 0
    progress: float = 0.0  # 0 to 100; never goes back
    phase: str = ""
    seconds_left: float | None = None
    created_at: float = 0.0
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    error: JobError | None = None
    remixed_from: str | None = None
    files: tuple[OutputFile, ...] = ()
    report: dict[str, Any] = field(default_factory=dict)  # what the engine measured: timings, peak memory, warnings
    attempts: int = 0
    crashes: int = 0
    worker: str | None = None
    token: int = 0
    model_hash: str | None = None

    @property
    def waits_for(self) -> str | None:
        """Why nobody takes a queued job, for people; None if nothing is known to keep it."""
        return self.report.get(WAITING) if self.status == "queued" and self.phase == WAITING else None

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status not in OPEN_STATUSES


@dataclass(frozen=True, slots=True)
class ModelId:
    """A model as jobs are accepted for it: its public name, and a hash of its weights (None: there is none to compare)."""

    name: str
    hash: str | None = None


@dataclass(frozen=True, slots=True)
class NewJob:
    """What `JobStore.submit` stores. `request` holds JSON values only. With `model_hash`, only workers that have these very
    weights of the model run the job.
    """

    owner: str
    model: str
    request: dict[str, Any]
    priority: int = 0
    idempotency_key: str | None = None
    remixed_from: str | None = None
    fingerprint: str | None = None  # of what the client sent, where defaults (a drawn seed) were added since
    model_hash: str | None = None


@dataclass(frozen=True, slots=True)
class Submitted:
    """The stored job, and whether this call stored it (False: the idempotency key was known)."""

    job: StoredJob
    created: bool


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to run one job. `token` grows with every claim of that job: a commit with an older one is refused."""

    job: StoredJob
    worker: str
    token: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Pulse:
    """A lease seen from outside. While its holder lives, `beat` grows at least once in `lease_seconds`."""

    job_id: str
    worker: str
    token: int
    beat: int
    lease_seconds: float


@dataclass(frozen=True, slots=True)
class Page:
    """Some jobs of a list, and whether there are more after them."""

    jobs: tuple[StoredJob, ...]
    has_more: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """How much the queue takes: open jobs of everybody, and of one owner. None: no limit."""

    queue: int | None = None
    per_owner: int | None = None


@dataclass(frozen=True, slots=True)
class Statistics:
    """The queue in numbers: jobs by status, failures by code, how long the oldest has waited (seconds),
    `(seconds, jobs)` by stage, peak bytes by device of the newest completed job.
    """

    by_status: dict[str, int]
    failures: dict[str, int]
    oldest_wait: float
    stages: dict[str, tuple[float, int]]
    peak_memory_bytes: dict[str, int]


class StaleLeaseError(WanduetError):
    """The lease is no longer the worker's: the job was cancelled, deleted, finished, or given to another."""

    code: ClassVar[str] = "stale_lease"


class QueueFullError(WanduetError):
    """Nothing was stored because too many jobs wait. `personal`: only this owner's quota is used up."""

    code: ClassVar[str] = "queue_full"

    def __init__(self, limit: int, *, personal: bool) -> None:
        whose = "You have" if personal else "The queue has"
        super().__init__(f"{whose} {limit} jobs waiting or running, which is the limit.", hint="Try again later.")
        self.limit = limit
        self.personal = personal


class IdempotencyError(WanduetError):
    """An idempotency key came again with another request."""

    code: ClassVar[str] = "idempotency_key_reused"


class UnknownJobError(WanduetError):
    """There is no such job, or it belongs to someone else."""

    code: ClassVar[str] = "not_found"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"There is no job {job_id[:64]!r}.")


class StoreBrokenError(WanduetError, SQLAlchemyError):
    """The job database, or the data folder, cannot be used until a person does something; trying again is of no use.

    A database that is locked, out of room or not reached is another error of SQLAlchemy's, and worth another try.
    """

    code: ClassVar[str] = "store_broken"  # type: ignore[misc]  # SQLAlchemy has a code of its own

    def __str__(self) -> str:
        return WanduetError.__str__(self)


class StoreDamagedError(StoreBrokenError):
    """The database file is damaged, or is no database."""

    code: ClassVar[str] = "store_damaged"  # type: ignore[misc]  # SQLAlchemy has a code of its own


class StoreReadOnlyError(StoreBrokenError):
    """The database cannot be written: its file, folder or file system is read-only, or permission is missing."""

    code: ClassVar[str] = "store_read_only"  # type: ignore[misc]  # SQLAlchemy has a code of its own


class StoreGoneError(StoreBrokenError):
    """The database or the data folder is not there any more, or another one is in its place."""

    code: ClassVar[str] = "store_gone"  # type: ignore[misc]  # SQLAlchemy has a code of its own


class StoreBusyError(SQLAlchemyError):
    """Another process kept the database locked for longer than a writer waits; trying again later is right."""


class ForeignDatabaseError(ConfigError):
    """The data folder belongs to another job database than the one that was given."""

    code: ClassVar[str] = "foreign_database"


def make_id(now: float, newest: str | None) -> str:
    """A job id that sorts after `newest` and cannot be guessed: 48 bits of milliseconds, 80 random bits.

    Ids grow even while the clock goes back, so lists and the queue keep their order.
    """
    moment = max(0, int(now * 1000))
    if newest is not None:
        moment = max(moment, int(newest[6:18], 16) + 1)
    return f"video_{moment:012x}{secrets.token_hex(10)}"


def demand_of(request: dict[str, Any]) -> str:
    """What of a request decides memory and time, as a short text that a queue can be grouped by.

    `HEIGHTxWIDTHxFRAMES/STEPS/BRANCHES/VIDEOS`, for example `480x832x81/50/2/1`; `-` where the model's default holds.
    """
    scale = request.get("guidance_scale")
    branches = None if scale is None else 1 + (scale > 1.0)
    numbers = [request.get(name) for name in ("height", "width", "num_frames", "num_inference_steps")]
    height, width, frames, steps, branches, videos = (
        "-" if number is None else number for number in (*numbers, branches, request.get("num_videos_per_prompt", 1))
    )
    return f"{height}x{width}x{frames}/{steps}/{branches}/{videos}"


def is_job_id(text: str) -> bool:
    """Whether a text has the form of a job's id; only such texts ever become part of a file name."""
    return _ID.fullmatch(text) is not None
