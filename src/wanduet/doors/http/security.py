"""Checks in front of the application: allowed hosts, allowed origins, HEAD.

This is plain ASGI middleware, so that responses are never buffered.
"""

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wanduet.doors.http.errors import ApiError
from wanduet.errors import ConfigError

LOOPBACK_NAMES = ("localhost",)
OWN_HEAD = ("/content", "/events")  # these paths handle HEAD themselves: one does not read its file, one never ends
_WRITES = ("POST", "PUT", "PATCH", "DELETE")


def check_bind(host: str, has_keys: bool) -> None:
    """Raise ConfigError if `host` is reachable from other machines and no key is set."""
    if not is_loopback(host) and not has_keys:
        raise ConfigError(
            f"host={host!r} can be reached from other machines, and no API key is set.",
            hint="Make a key first with `wanduet keys add NAME`, or take --host 127.0.0.1.",
        )


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a host."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() in LOOPBACK_NAMES


class Guard:
    """Refuses requests for unknown hosts (DNS rebinding) and writes from other sites' pages.

    A host is allowed if it is an IP address (no name that an attacker could point here), `localhost`, or in
    `allowed_hosts`. A browser's write names the origin of its page, which must be this host or in `allowed_origins`.
    """

    def __init__(self, app: ASGIApp, *, allowed_hosts: tuple[str, ...], allowed_origins: tuple[str, ...]) -> None:
        self._app = app
        self._hosts = frozenset(name.lower() for name in (*LOOPBACK_NAMES, *allowed_hosts))
        self._origins = frozenset(origin.lower().rstrip("/") for origin in allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "websocket":  # no route accepts websockets
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_host(headers)
            if scope["method"] in _WRITES:
                self._check_origin(headers)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, _without_sniffing(send))

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


class AnswerHead:
    """Handles HEAD as GET without a body, which FastAPI's routes do not; monitoring services send HEAD."""

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
                scope["route"] = as_get["route"]  # the middleware that counts requests reads the route here
            await send(message)

        await self._app(as_get, receive, bare_send)


def _without_sniffing(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]}
        await send(message)

    return sending


def _host_name(host: str) -> str | None:
    """Return the name in a Host header, without its port; None if the header is invalid."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises ValueError for an invalid port
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
