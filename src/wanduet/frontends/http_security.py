"""What stands before the application: which hosts, which origins, how much of a body, HEAD.

Plain ASGI, so that a body is counted while it streams in and an answer is never buffered.
"""

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wanduet.errors import ConfigError
from wanduet.frontends.http_errors import ApiError

LOOPBACK_NAMES = ("localhost",)
UPLOAD_PATH = "/page/settings"  # the page's: a video whose settings are wanted
MAX_UPLOAD_BYTES = 2**28
OWN_HEAD = ("/content", "/events")  # ends of paths: one answers HEAD without reading the file, the other never ends
_WRITES = ("POST", "PUT", "PATCH", "DELETE")


def check_bind(host: str, has_keys: bool) -> None:
    """Refuse to be reached from other machines without a key. Raises ConfigError."""
    if not is_loopback(host) and not has_keys:
        raise ConfigError(
            f"host={host!r} can be reached from other machines, and no API key is set.",
            hint="Make a key first, or bind 127.0.0.1.",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() in LOOPBACK_NAMES


class Guard:
    """Refuses requests for strange hosts (DNS rebinding), writes from strange pages, and bodies that are too long.

    A host is known if it is an address (no name that an attacker could point here), `localhost`, or in
    `allowed_hosts`. A write that a browser sends names its page's origin, which must be this host or in
    `allowed_origins`.
    """

    def __init__(
        self, app: ASGIApp, *, allowed_hosts: tuple[str, ...], allowed_origins: tuple[str, ...], max_body_bytes: int
    ) -> None:
        self._app = app
        self._hosts = frozenset(name.lower() for name in (*LOOPBACK_NAMES, *allowed_hosts))
        self._origins = frozenset(origin.lower().rstrip("/") for origin in allowed_origins)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_host(headers)
            if scope["method"] in _WRITES:
                self._check_origin(headers)
            limit = self._limit(scope["path"])
            self._check_length(headers, limit)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self._run_counting(scope, receive, send, limit)

    def _check_host(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        name = _host_name(hosts[0]) if len(hosts) == 1 else None
        if name is None or not (name in self._hosts or _is_address(name)):
            raise ApiError(400, "invalid_host", "This server does not go by that name.", param="Host")

    def _check_origin(self, headers: Headers) -> None:
        for origin in headers.getlist("origin"):
            given = origin.lower().rstrip("/")
            own = given.partition("://")[2] == headers["host"].lower() and given.startswith(("http://", "https://"))
            if not own and given not in self._origins:
                raise ApiError(403, "forbidden_origin", "Pages of other sites may not write here.", param="Origin")

    def _limit(self, path: str) -> int:
        return MAX_UPLOAD_BYTES if path == UPLOAD_PATH else self._max_body_bytes

    def _check_length(self, headers: Headers, limit: int) -> None:
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            raise ApiError(400, "invalid_request", "The length is no number.", param="Content-Length")
        if len(length) > 18 or int(length) > limit:
            raise _too_long(limit)

    async def _run_counting(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        """Run the application; a body that turns out too long ends it and is answered with 413."""
        seen = 0
        too_long = started = False

        async def counting_receive() -> Message:
            nonlocal seen, too_long
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > limit:
                    too_long = True
                    return {"type": "http.disconnect"}
            return message

        async def watching_send(message: Message) -> None:
            nonlocal started
            if too_long and not started:
                return  # whatever the application makes of half a body, 413 is the answer
            started = True
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]}
            await send(message)

        try:
            await self._app(scope, counting_receive, watching_send)
        except Exception:
            if not too_long or started:
                raise
        if too_long and not started:
            await _too_long(limit).response()(scope, receive, send)


class AnswerHead:
    """Answers HEAD as GET without the body, which FastAPI's routes do not: what watches a server may ask so."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or scope["method"] != "HEAD" or scope["path"].endswith(OWN_HEAD):
            await self._app(scope, receive, send)
            return
        as_get = {**scope, "method": "GET"}

        async def bare_send(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            elif "route" in as_get:
                scope["route"] = as_get["route"]  # where those look who count
            await send(message)

        await self._app(as_get, receive, bare_send)


def _too_long(limit: int) -> ApiError:
    return ApiError(413, "body_too_large", f"A request's body may have {limit} bytes at most.")


def _host_name(host: str) -> str | None:
    """The name in a Host header, without its port; None if it is no host."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises ValueError for what is no port
        bare = parts.username is None and not parts.path and not parts.query and not parts.fragment
        return parts.hostname if bare else None
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
