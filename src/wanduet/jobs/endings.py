"""The column values that are stored when a job ends, or when an attempt at it ends."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from wanduet.jobs.records import JobError, OutputFile

if TYPE_CHECKING:
    import sqlalchemy as sa

Values = dict[str, Any]
PATIENCE = 10  # times `max_crashes`: attempts before a job is suspected of killing the whole service
_FREE: Values = {"worker": None, "phase": "", "seconds_left": None}
BACK_IN_THE_QUEUE: Values = {"status": "queued", **_FREE}


def completed(files: Sequence[OutputFile], report: Values, now: float, expires_at: float | None) -> Values:
    """For a job whose files are published."""
    return {
        "status": "completed",
        "progress": 100.0,
        **_FREE,
        "completed_at": now,
        "expires_at": expires_at,
        "files": [asdict(file) for file in files],
        "files_bytes": sum(file.num_bytes for file in files),
        "report": report,
    }


def failed(error: JobError, now: float, expires_at: float | None) -> Values:
    """For a job that ends with an error."""
    return {
        "status": "failed",
        **_FREE,
        "completed_at": now,
        "expires_at": expires_at,
        "error_code": error.code,
        "error_message": error.message,
        "error_type": error.type,
        "error_param": error.param,
    }


def after_crash(row: "sa.Row[Any]", failure: Values, max_crashes: int, alone: bool) -> Values:
    """For a job whose worker died: back into the queue, or `failure` after too many crashes.

    `alone`: only the worker died, not its supervisor with it.
    """
    # On an unreliable machine a long job goes on as long as it gets farther; one that dies at the same place is failed.
    farther = row.progress > row.crash_progress
    crashes = 1 if farther else row.crashes + alone
    poison = crashes >= max_crashes if alone else not farther and row.attempts >= PATIENCE * max_crashes
    ending = failure if poison else BACK_IN_THE_QUEUE
    return {**ending, "crashes": max(crashes, 1), "crash_progress": row.progress}
