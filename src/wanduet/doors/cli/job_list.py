"""Jobs as `wanduet jobs` prints them."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wanduet.jobs.records import Page, StoredJob


def describe(job: "StoredJob") -> dict[str, Any]:
    """Return a job for people and programs, without the fields that only workers need."""
    error = None if job.error is None else {"code": job.error.code, "message": job.error.message}
    return {
        "id": job.id,
        "status": job.status,
        "progress": round(job.progress, 1),
        "phase": job.phase,
        "seconds_left": job.seconds_left,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "completed_at": job.completed_at,
        "expires_at": job.expires_at,
        "model": job.model,
        "owner": job.owner,
        "attempts": job.attempts,
        "error": error,
        "waits_for": job.waits_for,
        "remixed_from": job.remixed_from,
        "request": job.request,
    }


def for_people(about: dict[str, Any]) -> dict[str, Any]:
    """Return the same with times as local date and time."""
    times = {name: _when(value) for name, value in about.items() if name.endswith("_at") and value is not None}
    return {**about, **times}


def _when(moment: float) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M:%S")


def show_jobs(page: "Page") -> None:
    """Print one line a job, however narrow the terminal: other commands need the whole id."""
    from wanduet.untrusted import printable

    lines = []
    for job in page.jobs:
        status = job.error.code if job.error else job.status.replace("_", " ")
        if job.status == "in_progress":
            status = f"{job.phase or 'starting'} {job.progress:.0f} %"
        prompt = printable(" ".join(str(job.request.get("prompt", "")).split()))
        lines.append((job.id, status, _when(job.created_at)[:-3], prompt if len(prompt) <= 60 else f"{prompt[:59]}…"))
    if not lines:
        print("No jobs.")
        return
    widths = [
        max(map(len, column)) for column in zip(("id", "status", "made"), *(line[:3] for line in lines), strict=True)
    ]
    for line in (("id", "status", "made", "prompt"), *lines):
        print("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]))
    if page.has_more:
        print(f"There are more: --after {page.jobs[-1].id}", file=sys.stderr)
