"""The server's connections: limits on their number, and timeouts for slow clients.

Uvicorn and h11 implement HTTP; this module adds the limits that they lack. A client that sends half a request, or does
not read its response, occupies one connection for a limited time. An idle connection is closed early if a new client
needs its place.
"""

import asyncio
import json
import os
import select
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from types import FrameType

import anyio.to_thread
import h11
import structlog
import uvicorn
from fastapi import FastAPI
from sse_starlette.sse import AppStatus
from uvicorn.protocols.http.h11_impl import H11Protocol

from wanduet.doors.http.context import ServerContext, ServerSettings
from wanduet.doors.http.errors import INVALID, ErrorBody, ErrorDetail
from wanduet.errors import ConfigError
from wanduet.jobs.library_logs import RateLimit

Announce = Callable[[str], None]
DRAIN_SECONDS = 20  # for responses in progress, and again for the worker
BACKLOG = 2048  # connections that the system queues before they are accepted
STOPPING = "stopping: running jobs are kept and go on at the next start; the same signal again stops at once"
STOPPING_AT_ONCE = "stopping at once"
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 0.05
_CROWD_GRACE_SECONDS = 0.001  # while others wait to be accepted: data sent with the connection has arrived by then
_PAUSE_SECONDS = 0.02
_LEAST_TAKEN = 2**14  # bytes of the response that a client must read within `stall_seconds`
_LAST_SECONDS = 2.0  # for the application's shutdown after a second signal

if sys.platform == "linux":
    import fcntl
    import termios

log = structlog.get_logger(__name__)


class Connection(H11Protocol):
    """Uvicorn's connection, with timeouts for idle and slow clients."""

    waits_since = 0.0  # since when it waits for a request, or for the rest of a body that is not read
    _paused = False  # writing is paused until the client has read what was sent
    _stall: tuple[float, int] | None = None  # since when the client reads nothing, and the bytes that were unread then

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the header timeout for a new client."""
        super().connection_made(transport)
        self.waits_since = self.loop.time()

    @property
    def answering(self) -> bool:
        """Return whether the application is handling a request."""
        return self.cycle is not None and not self.cycle.response_complete

    def is_overdue(self, settings: ServerSettings) -> bool:
        """Return whether the client has exceeded a timeout."""
        now = self.loop.time()
        unread = self.transport.get_write_buffer_size()
        if self._paused or (unread and not self.answering):
            unread += _unsent(self.transport.get_extra_info("socket"))
            if self._stall is None or unread <= self._stall[1] - _LEAST_TAKEN:
                self._stall = now, unread
            return now - self._stall[0] > settings.stall_seconds
        if self._stall is not None:
            self._stall, self.waits_since = None, now
        return not self.answering and now - self.waits_since > settings.header_seconds

    def give_up(self) -> None:
        """Close the connection now; send a 408 first if a part of a request has arrived."""
        if self.transport.get_write_buffer_size():  # the system must not keep unread data either
            _forget_unsent(self.transport.get_extra_info("socket"))
        elif not self.answering and self.conn.trailing_data[0]:
            self._refuse(408, "request_timeout", "The request did not arrive in time. Send it again.")
        self.transport.abort()

    def on_response_complete(self) -> None:
        """Start waiting for the next request."""
        self.waits_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Note that the client reads more slowly than the response is written."""
        self._paused = True
        super().pause_writing()

    def resume_writing(self) -> None:
        """Note that the client has read nearly everything."""
        self._paused, self._stall = False, None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP with 400; if another response is in progress, only close the connection."""
        if self.cycle is not None and self.answering:
            # At once: until the loop reports the lost connection, the application may send, which h11 now refuses.
            self.cycle.disconnected = True
        if self._refuse(400, "invalid_request", msg):
            self.transport.close()
        else:
            self.transport.abort()

    def _refuse(self, status: int, code: str, message: str) -> bool:
        body = json.dumps(ErrorBody(error=ErrorDetail(message=message, type=INVALID, code=code)).model_dump()).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        reason = HTTPStatus(status).phrase.encode()
        with suppress(h11.LocalProtocolError):
            answer = h11.Response(status_code=status, headers=headers, reason=reason)
            parts = [self.conn.send(event) for event in (answer, h11.Data(data=body), h11.EndOfMessage())]
            self.transport.write(b"".join(part for part in parts if part))
            return True
        return False


class Server(uvicorn.Server):
    """Uvicorn with a bounded number of connections; sets `draining` as soon as it receives a signal to stop.

    `announce` is called with the server's URL once it listens.
    """

    def __init__(self, app: FastAPI, announce: Announce = lambda url: None) -> None:
        self._context: ServerContext = app.state.context
        super().__init__(_configure(app, self._context.settings))
        # sse-starlette would cut event streams off; these streams end on `draining`.
        AppStatus.disable_automatic_graceful_drain()
        self._announce = announce
        self._loop: asyncio.AbstractEventLoop | None = None
        self._rate = RateLimit()
        self._background: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then accept clients on the first socket, which must be bound."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=[])
        if not self.started or not sockets:
            return
        anyio.to_thread.current_default_thread_limiter().total_tokens = self._context.capacity.threads
        sockets[0].setblocking(False)
        sockets[0].listen(BACKLOG)
        self._background = [asyncio.create_task(self._accept(sockets[0])), asyncio.create_task(self._watch())]
        self._announce(_url(self._context.settings.host, sockets[0].getsockname()[1]))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting clients, let responses finish, end the application."""
        accepting, watching = self._background or (None, None)
        if accepting is not None:
            accepting.cancel()
            await asyncio.wait([accepting])
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn skips the application's shutdown then
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_SECONDS):
                    await self.lifespan.shutdown()
        if watching is not None:
            watching.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; stop at once at the second."""
        text = STOPPING
        if self._context.draining.is_set():
            self.force_exit, text = True, STOPPING_AT_ONCE
        self._context.draining.set()
        if self._loop is not None:  # not here: the signal may have interrupted another line, which has the log's lock
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(log.warning, text)
        super().handle_exit(sig, frame)

    async def _accept(self, listener: socket.socket) -> None:
        """Accept clients, with pauses after errors: uvicorn's own loop logs every failed accept, without a limit."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except Exception as error:
                self._log_rarely("a client could not be accepted", error)
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            try:
                await self._make_room(listener)
                await loop.connect_accepted_socket(self._make_connection, connection)
            except BaseException as error:
                connection.close()
                if not isinstance(error, Exception):  # cancelled: the server ends
                    raise
                self._log_rarely("a client could not be accepted", error)

    def _make_connection(self) -> Connection:
        return Connection(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    async def _make_room(self, listener: socket.socket) -> None:
        """Wait until one more connection fits, closing the connection that has been idle longest."""
        while len(self.server_state.connections) >= self._context.capacity.connections:
            await asyncio.sleep(0)  # lets data of the newest connection be read before its idle time is checked
            waiting = [one for one in self._connections() if not one.answering and not one.transport.is_closing()]
            oldest = min(waiting, key=lambda one: one.waits_since, default=None)
            if oldest is None:
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            # A connection that has only just been accepted may have its request on the way.
            grace = _CROWD_GRACE_SECONDS if _is_crowded(listener) else _GRACE_SECONDS
            left = oldest.waits_since + grace - oldest.loop.time()
            if left > 0:
                await asyncio.sleep(min(left, _PAUSE_SECONDS))
                continue
            oldest.give_up()
            self._log_rarely("a connection that waited was closed: there are too many")

    async def _watch(self) -> None:
        """Close connections that exceed a timeout."""
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            for connection in self._connections():
                try:
                    if connection.is_overdue(self._context.settings):
                        connection.give_up()
                except Exception as error:
                    self._log_rarely("a connection could not be closed", error)

    def _connections(self) -> list[Connection]:
        return [one for one in self.server_state.connections if isinstance(one, Connection)]

    def _log_rarely(self, text: str, error: Exception | None = None) -> None:
        about = {} if error is None else {"error": type(error).__name__, "number": getattr(error, "errno", None)}
        kept_back = self._rate.admit((text, *about.values()))
        if kept_back is not None:
            log.warning(text, **about, kept_back=kept_back)


def listen(host: str, port: int) -> socket.socket:
    """Return a bound socket. Raises ConfigError."""
    bare = host.strip("[]")
    family = socket.AF_INET6 if ":" in bare else socket.AF_INET
    listener = socket.socket(family)
    try:
        if os.name == "posix":  # on Windows the option would let two servers bind one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((bare, port))
    except OSError as error:
        listener.close()
        hint = "Take another, such as --port 8001; --port 0 takes any that is free."
        raise ConfigError(f"Cannot listen at {host}, port {port}: {error.strerror}.", hint=hint) from error
    return listener


def _is_crowded(listener: socket.socket) -> bool:
    """Return whether more clients wait to be accepted."""
    try:
        return bool(select.select([listener], [], [], 0)[0])
    except (OSError, ValueError):  # ValueError: the file descriptor is too large for select
        return False


def _unsent(connection: socket.socket) -> int:
    """Return the bytes in the kernel's send buffer that the client has not acknowledged; 0 if the system cannot say."""
    if sys.platform != "linux":
        return 0
    with suppress(OSError):
        return int.from_bytes(fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    return 0


def _forget_unsent(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("hh" if os.name == "nt" else "ii", 1, 0))


def _configure(app: FastAPI, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )


def _url(host: str, port: int) -> str:
    bare = host.strip("[]")
    return f"http://[{bare}]:{port}" if ":" in bare else f"http://{bare}:{port}"
