"""Limits on requests: how many run at one time, how many bytes they send, and how long that may take.

This is plain ASGI middleware in front of all routes, so that nothing of a refused request is read.
"""

import asyncio
import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wanduet.doors.http.bodies import MULTIPART
from wanduet.doors.http.errors import ApiError, too_long, unavailable
from wanduet.doors.http.gates import Gate

UPLOAD_PATH = "/page/settings"  # the page's upload of a video, to read its settings
CREATE_PATH = "/v1/videos"  # a form for this route may have a video
MAX_UPLOAD_BYTES = 2**28
MAX_LOGIN_BYTES = 2**13
MAX_BYTES_AT_ONCE = 2**26  # total of all bodies in memory
MAX_UPLOADS_AT_ONCE = 2**29  # total bytes of all uploads that are written to disk
MIN_RATE = 2**14  # bytes a second: a body at this rate times out only after LONGEST_BODY_SECONDS
LONGEST_BODY_SECONDS = 600.0
DRAIN_BODY_SECONDS = 5.0  # while draining, later bodies are refused: the server is about to end
LINGER_SECONDS = 2.0
BUSY_RETRY_SECONDS = 5
DRAIN_RETRY_SECONDS = 15
ALWAYS_ANSWERED = "/health"  # exempt from the limit: it costs nothing and shows that an overloaded server is alive
_POLL_SECONDS = 0.5  # how often a waiting body checks whether the server is draining


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Limits of one body. It must arrive within `seconds`, extended by its bytes so far divided by `MIN_RATE`."""

    max_bytes: int = 2**20
    seconds: float = 20.0
    max_file_bytes: int = 0  # of a file in a form, beside `max_bytes` of text

    def on_disk(self, path: str, is_form: bool) -> int:
        """Return how many bytes of a body may be written to disk instead of kept in memory."""
        if path == UPLOAD_PATH:
            return max(MAX_UPLOAD_BYTES, self.max_file_bytes)
        return self.max_file_bytes if path == CREATE_PATH and is_form else 0

    def bytes_at(self, path: str) -> int:
        """Return how many bytes of a body may be kept in memory."""
        if path == UPLOAD_PATH:
            return 0
        return min(MAX_LOGIN_BYTES, self.max_bytes) if path == "/login" else self.max_bytes


class LimitRequests:
    """Limits the requests in progress; further ones get 503 before anything of them is read."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        with ExitStack() as inside:
            if scope["type"] == "http" and scope["path"] != ALWAYS_ANSWERED:
                try:
                    inside.enter_context(self._gate.enter())
                except ApiError as error:
                    await error.response()(scope, receive, send)
                    return
            await self._app(scope, receive, send)


class LimitBodies:
    """Refuses bodies that are too long, by Content-Length or while they arrive, and bodies that arrive too slowly."""

    def __init__(self, app: ASGIApp, *, limits: BodyLimits, draining: threading.Event) -> None:
        self._app = app
        self._limits = limits
        self._draining = draining
        self._memory = _Budget(MAX_BYTES_AT_ONCE)
        self._disk = _Budget(max(MAX_UPLOADS_AT_ONCE, 2 * (limits.max_file_bytes + limits.max_bytes)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, headers = scope["path"], Headers(scope=scope)
        in_memory = self._limits.bytes_at(path)
        is_form = headers.get("content-type", "").partition(";")[0].strip().lower() == MULTIPART
        limit = in_memory + self._limits.on_disk(path, is_form)
        try:
            _check_length(headers, limit)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        share = _Share(self._memory, self._disk, in_memory)
        body = _Body(receive, limit, self._limits.seconds, share, self._draining)
        try:
            await self._run(body, scope, send)
        finally:
            body.forget()

    async def _run(self, body: "_Body", scope: Scope, send: Send) -> None:
        started = False

        async def watching_send(message: Message) -> None:
            nonlocal started
            if body.error is not None and not started:
                return  # the application saw a truncated body: send the error instead of its response
            started = True
            await send(message)

        try:
            await self._app(scope, body.receive, watching_send)
        except ClientDisconnect:  # the client has disconnected: there is no response to send
            pass
        except Exception:
            if body.error is None or started:
                raise
        if body.error is not None and not started:
            await body.error.response()(scope, body.receive, send)


class LetBodiesEnd:
    """Reads and discards the rest of a request body after the response, for up to LINGER_SECONDS.

    If the connection closed with unread data, the system would reset it, and most clients would report a broken
    connection instead of reading the response.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or not _sends_and_closes(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        complete = False

        async def watching_receive() -> Message:
            nonlocal complete
            message = await receive()
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        async def sending(message: Message) -> None:
            last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if last and not complete:
                await send({**message, "more_body": True})
                with suppress(TimeoutError):
                    async with asyncio.timeout(LINGER_SECONDS):
                        while not complete:
                            await watching_receive()
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await self._app(scope, watching_receive, sending)


def _sends_and_closes(headers: Headers) -> bool:
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    return has_body and "close" in headers.get("connection", "").lower() and "expect" not in headers


class _Budget:
    """A limit on the bytes of all bodies together; used only in the event loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._counted = 0

    def take(self, size: int) -> None:
        """Raises ApiError (503)."""
        if self._counted + size > self._limit:
            raise unavailable("overloaded", "Too much is being sent to this server just now.", BUSY_RETRY_SECONDS)
        self._counted += size

    def give(self, size: int) -> None:
        self._counted -= size


class _Share:
    """What one body takes of two budgets: of `memory` for its first `in_memory` bytes, of `disk` for the rest."""

    def __init__(self, memory: _Budget, disk: _Budget, in_memory: int) -> None:
        self._budgets = memory, disk
        self._left = in_memory
        self._taken = [0, 0]

    def take(self, size: int) -> None:
        """Raises ApiError (503)."""
        first = min(size, self._left)
        self._left -= first
        for index, part in enumerate((first, size - first)):
            self._budgets[index].take(part)
            self._taken[index] += part

    def give_back(self) -> None:
        for budget, taken in zip(self._budgets, self._taken, strict=True):
            budget.give(taken)
        self._taken = [0, 0]


class _Body:
    """One request's body while it arrives. `error` is set once the body is refused."""

    def __init__(self, receive: Receive, limit: int, seconds: float, share: _Share, draining: threading.Event) -> None:
        self._receive = receive
        self._limit = limit
        self._seconds = seconds
        self._share = share
        self._draining = draining
        self._clock = asyncio.get_running_loop().time
        self._began = self._clock()
        self._drain_began: float | None = None
        self._seen = 0
        self._complete = False
        self.error: ApiError | None = None

    async def receive(self) -> Message:
        """Return the next message; after a refusal, return `http.disconnect`, as if the client had gone away."""
        if self.error is not None:
            return {"type": "http.disconnect"}
        if self._complete:
            return await self._receive()
        try:
            message = await self._next()
            self._count(message)
        except ApiError as error:
            self.error = error
            return {"type": "http.disconnect"}
        return message

    def forget(self) -> None:
        """Release the body's bytes from the budgets."""
        self._share.give_back()

    def _count(self, message: Message) -> None:
        size = len(message.get("body", b""))
        self._seen += size
        if self._seen > self._limit:
            raise _too_long(self._limit)
        self._share.take(size)
        self._complete = message["type"] != "http.request" or not message.get("more_body", False)

    async def _next(self) -> Message:
        while True:
            left = self._seconds_left()
            try:
                async with asyncio.timeout(min(left, _POLL_SECONDS)):
                    return await self._receive()
            except TimeoutError:
                continue

    def _seconds_left(self) -> float:
        """Return the seconds until the body times out. Raises ApiError once it has, or once draining takes too long."""
        now = self._clock()
        if self._draining.is_set():
            if self._drain_began is None:
                self._drain_began = now
            if now - self._drain_began >= DRAIN_BODY_SECONDS:
                raise unavailable("shutting_down", "The server is shutting down.", DRAIN_RETRY_SECONDS)
        allowed = min(self._seconds + self._seen / MIN_RATE, LONGEST_BODY_SECONDS)
        left = self._began + allowed - now
        if left <= 0:
            raise ApiError(408, "request_timeout", "The body did not arrive in time. Send it again.")
        return left


def _check_length(headers: Headers, limit: int) -> None:
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise ApiError(400, "invalid_request", "The length is no number.", param="Content-Length")
    if len(length) > 18 or int(length) > limit:
        raise _too_long(limit)


def _too_long(limit: int) -> ApiError:
    return too_long(f"A request's body may have {limit} bytes at most.")
