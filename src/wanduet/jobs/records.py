"""The job store's values and errors: jobs, leases, pages. Frozen dataclasses; nothing here uses a database."""

import base64
import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from sqlalchemy.exc import SQLAlchemyError

from wanduet.errors import ConfigError, WanduetError
from wanduet.request import OFF_VALUES

Status = Literal["queued", "in_progress", "completed", "failed"]
Order = Literal["asc", "desc"]
OPEN_STATUSES: tuple[Status, ...] = ("queued", "in_progress")
MAX_PAGE = 100  # jobs in one page of `JobStore.list`
CANCELLED = "cancelled"
WORKER_CRASHED = "worker_crashed"
MODEL_CHANGED = "model_changed"
WAITING = "waiting"  # phase of a queued job that no worker can take; also the key of the reason in its report
INPUT = "input"  # variant of the video that a job starts from, among its files

_ID = re.compile(r"video_[0-9a-f]{12}[0-9a-f]{20}")


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed, in the HTTP API's terms: a stable `code`, a sentence, a class of errors, a field if any."""

    code: str
    message: str
    type: str = "server_error"
    param: str | None = None


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file of a job: `name` in the videos folder, made by the server; `index` of the video in the job."""

    variant: str
    index: int
    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class StoredJob:
    """A job as stored. Times are Unix seconds of the wall clock, for display only."""

    id: str
    owner: str
    model: str
    request: dict[str, Any]
    status: Status
    priority: int = 0
    progress: float = 0.0  # 0 to 100; never decreases
    phase: str = ""
    seconds_left: float | None = None
    created_at: float = 0.0
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    error: JobError | None = None
    remixed_from: str | None = None
    files: tuple[OutputFile, ...] = ()
    report: dict[str, Any] = field(default_factory=dict)  # the engine's timings, peak memory, warnings
    attempts: int = 0
    crashes: int = 0
    worker: str | None = None
    token: int = 0
    model_hash: str | None = None

    @property
    def waits_for(self) -> str | None:
        """Why no worker takes a queued job, for people; None if no reason is known."""
        return self.report.get(WAITING) if self.status == "queued" and self.phase == WAITING else None

    @property
    def finished(self) -> bool:
        """Whether the job is completed, failed or cancelled."""
        return self.status not in OPEN_STATUSES

    @property
    def inputs(self) -> tuple[OutputFile, ...]:
        """Those of its files that were there before its first attempt: none, or the video that it starts from."""
        return tuple(file for file in self.files if file.variant == INPUT)


@dataclass(frozen=True, slots=True)
class ModelId:
    """The model that a job was accepted for: its public name, and a hash of its weights (None: not known)."""

    name: str
    hash: str | None = None


@dataclass(frozen=True, slots=True)
class NewJob:
    """What `JobStore.submit` stores. `request` contains only JSON values. With `model_hash`, only workers with exactly
    these weights run the job. `webhooks`: addresses that are called when it ends.
    """

    owner: str
    model: str
    request: dict[str, Any]
    priority: int = 0
    idempotency_key: str | None = None
    remixed_from: str | None = None
    fingerprint: str | None = None  # digest of the client's request, before defaults such as a random seed were added
    model_hash: str | None = None
    webhooks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Submitted:
    """The stored job, and whether this call stored it. False: it was stored earlier under the same idempotency key."""

    job: StoredJob
    created: bool


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to run one job. `token` grows with each claim of the job; a commit with an older one is refused."""

    job: StoredJob
    worker: str
    token: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Pulse:
    """A lease as others see it. While its worker is alive, `beat` grows at least once in `lease_seconds`."""

    job_id: str
    worker: str
    token: int
    beat: int
    lease_seconds: float


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list of jobs, and whether more follow."""

    jobs: tuple[StoredJob, ...]
    has_more: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of the queue: open jobs in all, and of one owner. None: no limit."""

    queue: int | None = None
    per_owner: int | None = None


@dataclass(frozen=True, slots=True)
class Statistics:
    """The queue in numbers: jobs by status, failures by code, the oldest queued job's waiting time in seconds,
    `(seconds, jobs)` by stage, peak bytes by device of the newest completed job.
    """

    by_status: dict[str, int]
    failures: dict[str, int]
    oldest_wait: float
    stages: dict[str, tuple[float, int]]
    peak_memory_bytes: dict[str, int]


class StaleLeaseError(WanduetError):
    """The lease is no longer valid: the job was cancelled, deleted, finished, or given to another worker."""

    code: ClassVar[str] = "stale_lease"


class QueueFullError(WanduetError):
    """Too many open jobs; nothing was stored. `personal`: the limit is the owner's, not that of the whole queue."""

    code: ClassVar[str] = "queue_full"

    def __init__(self, limit: int, *, personal: bool) -> None:
        whose = "You have" if personal else "The queue has"
        super().__init__(f"{whose} {limit} jobs waiting or running, which is the limit.", hint="Try again later.")
        self.limit = limit
        self.personal = personal


class IdempotencyError(WanduetError):
    """An idempotency key was used before for a different request."""

    code: ClassVar[str] = "idempotency_key_reused"


class InputLostError(WanduetError):
    """The video that a job starts from is missing, or is not the one that was stored with the job."""

    code: ClassVar[str] = "input_lost"


class LoraLostError(WanduetError):
    """A LoRA of a job has another content than when the job was submitted, or this worker does not have it."""

    code: ClassVar[str] = "lora_lost"

    def __init__(self, name: object) -> None:
        super().__init__(
            f"The LoRA {name} is not what it was when the job was submitted: its file has changed, or is missing in this "
            "worker's folder of LoRA.",
            hint="Submit the job again.",
        )


class UnknownJobError(WanduetError):
    """There is no such job, or it belongs to another owner."""

    code: ClassVar[str] = "not_found"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"There is no job {job_id[:64]!r}.")


class StoreBrokenError(WanduetError, SQLAlchemyError):
    """The job database or the data folder cannot be used until an operator fixes it; retrying does not help.

    A locked, full or unreachable database raises SQLAlchemy's own errors instead, after which retrying may help.
    """

    code: ClassVar[str] = "store_broken"  # type: ignore[misc]  # SQLAlchemy has a code of its own

    def __str__(self) -> str:
        return WanduetError.__str__(self)


class StoreDamagedError(StoreBrokenError):
    """The database file is damaged, or is not a database."""

    code: ClassVar[str] = "store_damaged"  # type: ignore[misc]  # SQLAlchemy has a code of its own


class StoreReadOnlyError(StoreBrokenError):
    """The database cannot be written: its file, folder or file system is read-only, or permission is missing."""

    code: ClassVar[str] = "store_read_only"  # type: ignore[misc]  # SQLAlchemy has a code of its own


class StoreGoneError(StoreBrokenError):
    """The database or the data folder was removed or replaced."""

    code: ClassVar[str] = "store_gone"  # type: ignore[misc]  # SQLAlchemy has a code of its own


class StoreBusyError(SQLAlchemyError):
    """Another process kept the database locked for longer than a writer waits; retry later."""


class ForeignDatabaseError(ConfigError):
    """The data folder belongs to another job database than the given one."""

    code: ClassVar[str] = "foreign_database"


def make_id(now: float, newest: str | None) -> str:
    """Return a job id that sorts after `newest` and cannot be guessed: 48 bits of milliseconds, 80 random bits.

    Ids grow even if the clock is set back, so lists and the queue keep their order.
    """
    moment = max(0, int(now * 1000))
    if newest is not None:
        moment = max(moment, int(newest[6:18], 16) + 1)
    return f"video_{moment:012x}{secrets.token_hex(10)}"


def submitted_at(job_id: str) -> float:
    """When the job was submitted, by its id, in Unix seconds."""
    return int(job_id[6:18], 16) / 1000


_TAG = 6  # characters, of 6 bits each
# The fields that are off by default, by names of one letter: a demand is in a column of limited length.
SHORT_NAMES: Mapping[str, str] = {
    "c": "step_cache",
    "g": "guidance_gate",
    "s": "sparse",
    "q": "quantize",
    "a": "quantize_attention",
    "l": "low_res_first",
    "i": "guidance_interval",
    "m": "guidance_mode",
}
# Their values that are words.
SHORT_WORDS: Mapping[str, str] = {
    "cfg-zero": "z", "apg": "a", "int8": "8", "int8-fast": "f", "easycache": "e", "magcache": "m", "teacache": "t",
}  # fmt: skip
LORAS = "L"  # before what tells sets of LoRA files apart


def demand_of(request: dict[str, Any]) -> str:
    """Return the fields of a request that determine its memory and time, as a short text by which the queue is grouped.

    `HEIGHTxWIDTHxFRAMES/STEPS/BRANCHES/VIDEOS`, for example `480x832x81/50/2/1`; `-` for the model's default. Of a job
    with an input video, `/STRENGTH` follows; then the fields that are not off, as `/LETTER=VALUE`, and of a job with LoRA
    `/L=TAG`: jobs with the same files have the same tag.
    """
    scale = request.get("guidance_scale")
    branches = None if scale is None else 1 + (scale > 1.0)
    numbers = [request.get(name) for name in ("height", "width", "num_frames", "num_inference_steps")]
    height, width, frames, steps, branches, videos = (
        "-" if number is None else number for number in (*numbers, branches, request.get("num_videos_per_prompt", 1))
    )
    demand = f"{height}x{width}x{frames}/{steps}/{branches}/{videos}"
    if request.get("input_video") is not None:
        demand += "/-" if (strength := request.get("strength")) is None else f"/{_short(strength)}"
    for short, name in SHORT_NAMES.items():
        if (value := request.get(name)) not in (None, OFF_VALUES[name]):
            kind, colon, number = value.rpartition(":") if isinstance(value, str) else ("", "", value)
            demand += f"/{short}={SHORT_WORDS.get(kind, kind)}{colon}{_short(SHORT_WORDS.get(number, number))}"
    if loras := request.get("loras"):
        files = sorted((lora["name"], lora.get("sha256") or "") for lora in loras)
        digest = hashlib.sha256(json.dumps(files).encode()).digest()
        demand += f"/{LORAS}={base64.urlsafe_b64encode(digest)[:_TAG].decode()}"
    return demand


def loras_tag(demand: str) -> str | None:
    """Return what tells the LoRA files of a demand from others; None without LoRA."""
    return next((part for part in demand.split("/") if part.startswith(f"{LORAS}=")), None)


def _short(number: str | float) -> str:
    """Return a number with four digits, which are enough for an estimate; another text as it is."""
    try:
        return f"{float(number):.4g}"
    except ValueError:
        return str(number)


def is_job_id(text: str) -> bool:
    """Return whether a text has the form of a job id. Only such texts may become part of a file name."""
    return _ID.fullmatch(text) is not None
