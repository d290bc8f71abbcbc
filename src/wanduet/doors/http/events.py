"""Event streams: each change as it happens, until the owner loses access."""

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from wanduet.doors.http.context import ServerContext, find_owner, invalid_key
from wanduet.doors.http.gates import Gate
from wanduet.doors.http.keys import LOCAL_OWNER
from wanduet.doors.http.schemas import DeletedVideo, to_video
from wanduet.errors import WanduetError
from wanduet.jobs.records import StoredJob, UnknownJobError

PING_SECONDS = 15


Events = AsyncGenerator[ServerSentEvent | None]  # None: a poll without news


class OwnersStream(EventSourceResponse):
    """The streaming response.

    It takes a place at a gate when it is constructed, so that one stream too many is refused before it starts (ApiError:
    503, or 429 if one key has too many). It frees the place even if the client disconnects before the first event.
    """

    def __init__(self, context: ServerContext, headers: Headers, owner: str, gate: Gate, events: Events) -> None:
        self._context = context
        self._request_headers = headers
        self._owner = owner
        self._place = gate.enter(None if owner == LOCAL_OWNER else owner)  # one owner without keys: no share
        self._place.__enter__()
        super().__init__(self._allowed_events(events), ping=PING_SECONDS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._place.__exit__(None, None, None)

    async def _allowed_events(self, all_events: Events) -> AsyncIterator[ServerSentEvent]:
        """Yield the events while the owner's key is valid.

        The key is checked before each event and at each poll, so that neither a slow client nor a video without news
        keeps the stream of a revoked key open.
        """
        async with aclosing(all_events) as events:
            async for event in events:
                if not await run_in_threadpool(self._may_see):
                    yield sent("error", invalid_key().body())
                    return
                if event is not None:
                    yield event

    def _may_see(self) -> bool:
        try:
            return find_owner(self._context, self._request_headers) == self._owner
        except WanduetError:  # an unreadable key file grants no access
            return False


async def video_events(context: ServerContext, owner: str, job: StoredJob) -> Events:
    """Poll the job and yield each change; yield None for a poll without changes."""
    last = picture = None
    while True:
        data = {**to_video(job).model_dump(), "phase": job.phase, "seconds_left": job.seconds_left}
        yield None if data == last else sent("done" if job.finished else "video", data)
        last = data
        if job.status == "in_progress":
            newest = await run_in_threadpool(context.store.files.preview, job.id)
            if newest is not None and newest != picture:
                image = f"data:image/webp;base64,{base64.b64encode(newest).decode()}"
                yield sent("preview", {"id": job.id, "object": "video.preview", "image": image})
                picture = newest
        if job.finished or context.draining.is_set():
            return
        await asyncio.sleep(context.settings.stream_poll_seconds)
        try:
            job = await run_in_threadpool(context.store.get, job.id, owner)
        except UnknownJobError:
            yield sent("deleted", DeletedVideo(id=job.id).model_dump())
            return


def sent(name: str, data: Mapping[str, Any]) -> ServerSentEvent:
    """Return an event with JSON data."""
    return ServerSentEvent(json.dumps(data), event=name)
