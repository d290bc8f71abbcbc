"""The page's event stream: the server's state and every change of the visitor's jobs."""

import asyncio
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool

from wanduet.doors.http.context import ServerContext
from wanduet.doors.http.events import Events, sent
from wanduet.doors.http.public import public_text
from wanduet.doors.page.actions import PageActions
from wanduet.jobs.records import Page, StoredJob, UnknownJobError

PAGE_CARDS = 60  # videos in the gallery, and how many more each request for older ones returns

Known = Mapping[str, tuple[StoredJob, int]]  # jobs by their ids, each with a checksum of its preview (0: none)


async def page_events(actions: PageActions, owner: str, started: str) -> Events:
    """Poll the store and yield what has changed.

    `server`: whether a worker is ready; `started` identifies this run of the server. `videos`: changed jobs, newest
    first, and the ids of deleted ones; the first has the newest jobs, with `more` and `last` as in `older`.
    """
    context = actions.context
    known: Known | None = None
    state: dict[str, Any] | None = None
    while True:
        now = await run_in_threadpool(_state, context, started)
        if now != state:
            yield sent("server", now)
            state = now
        jobs, deleted, page = await run_in_threadpool(_look, context, owner, known or {})
        changed = [_shown(actions, jobs[id]) for id in sorted(jobs, reverse=True) if (known or {}).get(id) != jobs[id]]
        data = {"videos": changed, "deleted": deleted}
        if known is None:
            yield sent("videos", data | {"more": page.has_more, "last": _last(page)})
        else:
            yield sent("videos", data) if changed or deleted else None
        known = jobs
        if context.draining.is_set():
            return
        await asyncio.sleep(context.settings.stream_poll_seconds)


def older(actions: PageActions, owner: str, after: str) -> dict[str, Any]:
    """Return the jobs before the one with the id `after`, whether there are `more`, and the id of the `last` of these."""
    page = actions.context.store.list(owner, after=after, limit=PAGE_CARDS)
    return {"videos": [actions.card(job) for job in page.jobs], "more": page.has_more, "last": _last(page)}


def _last(page: Page) -> str | None:
    return page.jobs[-1].id if page.jobs else None


def _state(context: ServerContext, started: str) -> dict[str, Any]:
    trouble = context.trouble
    reason = None if trouble is None else public_text(trouble)
    return {"started": started, "ready": trouble is None, "reason": reason}


def _look(context: ServerContext, owner: str, known: Known) -> tuple[Known, list[str], Page]:
    """Return the newest jobs and the open ones, the ids of those that were deleted, and the page of the newest."""
    page = context.store.list(owner, limit=PAGE_CARDS)
    jobs = {job.id: job for job in page.jobs}
    deleted = []
    for id, (job, _) in known.items():
        if id in jobs or (job.finished and page.has_more and id < page.jobs[-1].id):
            continue  # finished jobs that newer ones have pushed off the list change no more
        try:
            jobs[id] = context.store.get(id, owner)
        except UnknownJobError:
            deleted.append(id)
    if page.has_more:  # an open job may be older than all of these
        jobs |= {job.id: job for job in context.store.list(owner, status="in_progress", limit=PAGE_CARDS).jobs}
    return dict(_with_previews(context, jobs)), deleted, page


def _with_previews(
    context: ServerContext, jobs: Mapping[str, StoredJob]
) -> Iterator[tuple[str, tuple[StoredJob, int]]]:
    for id, job in jobs.items():
        picture = context.store.files.preview(id) if job.status == "in_progress" else None
        yield id, (job, 0 if picture is None else zlib.crc32(picture) or 1)


def _shown(actions: PageActions, known: tuple[StoredJob, int]) -> dict[str, Any]:
    job, preview = known
    return actions.card(job) | {"preview": preview}
