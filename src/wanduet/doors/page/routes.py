"""Access to the page: login, the Gradio routes that are open, and a policy that forbids other hosts' content."""

import asyncio
import json
import secrets
from contextlib import ExitStack
from html import escape
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wanduet.doors.http.bodies import read_fields
from wanduet.doors.http.context import KEY_COOKIE, ServerContext, find_owner
from wanduet.doors.http.errors import ApiError, log_failure, to_api_error
from wanduet.doors.http.keys import came_encrypted
from wanduet.doors.http.limits import UPLOAD_PATH
from wanduet.errors import WanduetError

EVENTS_PATH = "/gradio_api/queue/join"
STREAM_PATHS = ("/gradio_api/queue/data", "/gradio_api/heartbeat/")  # responses that last as long as a page is open
LOOK_SECONDS = 0.5
PULSE_PATH = "/page/pulse"
COOKIE_SECONDS = 30 * 24 * 3600
# Allow content of this server only. Gradio's own scripts are inline and compile templates at run time.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; connect-src 'self'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
_OURS = ("/v1/", "/health", "/ready", "/metrics", "/openapi.json", "/login")
# The Gradio routes that the page needs: no proxy, no files by path, no monitoring.
_PAGES = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt")
_ASSETS = (
    "/static/", "/assets/", "/svelte/", "/gradio_api/queue/", "/gradio_api/heartbeat/", UPLOAD_PATH, PULSE_PATH,
    "/gradio_api/startup-events", "/gradio_api/theme.css", "/gradio_api/app_id", "/gradio_api/cancel",
    "/gradio_api/reset",
)  # fmt: skip

_LONGEST_NAME = 255  # bytes of a file name
_LARGEST_NUMBER = 2**53

_LOGIN = """<!doctype html><html lang="en"><meta charset="utf-8"><title>wanduet</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body{{font:16px/1.5 system-ui,sans-serif;display:grid;place-items:center;min-height:90vh;margin:0 1rem;
background:#fafaf9;color:#1c1917}}form{{width:min(22rem,100%)}}h1{{font-size:1.25rem;margin:0 0 1rem}}
input,button{{font:inherit;width:100%;box-sizing:border-box;padding:.6rem .8rem;border-radius:8px;
border:1px solid #d6d3d1;margin:.25rem 0 .75rem}}button{{background:#1c1917;color:#fff;cursor:pointer}}
p{{color:#b91c1c;min-height:1.5em;margin:0}}</style>
<form method="post" action="/login"><h1>wanduet</h1><label for="key">API key</label>
<input id="key" name="key" type="password" autocomplete="current-password" autofocus required>
<button>Sign in</button><p role="alert">{message}</p></form></html>"""


def add_login(app: FastAPI) -> None:
    """Add the routes that set and delete a browser's cookie."""

    @app.get("/login", include_in_schema=False)
    def login() -> HTMLResponse:
        return HTMLResponse(_LOGIN.format(message=""))

    @app.post("/login", include_in_schema=False)
    async def sign_in(request: Request) -> Response:
        key = str((await read_fields(request)).get("key", "")).strip()
        context: ServerContext = app.state.context
        if context.keys.owner(key) is None:
            return HTMLResponse(_LOGIN.format(message=escape("This key is not valid.")), 401)
        answer = RedirectResponse("/", 303)
        secure = came_encrypted(request.headers, request.url.scheme)
        answer.set_cookie(KEY_COOKIE, key, max_age=COOKIE_SECONDS, httponly=True, samesite="strict", secure=secure)
        return answer

    @app.post("/logout", include_in_schema=False)
    def sign_out() -> Response:
        answer = RedirectResponse("/login", 303)
        answer.delete_cookie(KEY_COOKIE)
        return answer


def add_pulse(app: FastAPI) -> None:
    """Add the route that an open page polls, to notice that its server is down, was restarted, or requires a key."""
    started = secrets.token_hex(8)

    @app.get(PULSE_PATH, include_in_schema=False)
    def pulse() -> dict[str, str]:
        return {"started": started}


class PageMount(Mount):
    """A mount of the page at `/` that leaves the API's paths to the API, also those that no route matches."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match all paths except the API's."""
        return (Match.NONE, {}) if is_api(scope["path"]) else super().matches(scope)


def keep_page_off_api(app: FastAPI) -> None:
    """Restrict the application that was mounted last to paths outside of the API."""
    mounted = app.router.routes[-1]
    assert isinstance(mounted, Mount)
    app.router.routes[-1] = PageMount(mounted.path, app=mounted.app)


def is_api(path: str) -> bool:
    """Return whether a path belongs to the API."""
    return path == "/v1" or path.startswith(_OURS)


class PageGate:
    """Checks a visitor's key, blocks the Gradio routes that the page does not need, and sets the content policy."""

    def __init__(self, app: ASGIApp, context: ServerContext) -> None:
        self._app = app
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        path = scope.get("path", "")
        if scope["type"] != "http" or path == "/logout" or is_api(path):
            await self._app(scope, receive, send if scope["type"] != "http" else _with_policy(send))
        elif _is_closed(path):
            await ApiError(404, "not_found", "Not Found").response()(scope, receive, send)
        else:
            try:
                owner = find_owner(self._context, Headers(scope=scope))
            except WanduetError as error:  # the application's error handlers run inside of this middleware
                answer = to_api_error(error)
                log_failure(error, answer.status, self._context.failures)
                await answer.response()(scope, receive, send)
                return
            await (self._open if owner is not None else _refuse)(scope, receive, send)

    async def _open(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith(STREAM_PATHS):
            await self._stream(scope, receive, send)
            return
        if scope["path"] != EVENTS_PATH:
            await self._app(scope, receive, _with_policy(_without_cors(send)))
            return
        # Gradio opens a file, or downloads a URL, for any field that looks like one. The page sends none.
        body = await Request(scope, receive).body()
        if _is_strange(body):
            await ApiError(400, "invalid_request", "That is nothing that the page sends.").response()(
                scope, receive, send
            )
            return
        given = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> Message:
            return next(given, None) or await receive()

        await self._app(scope, again, _without_cors(send))

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ExitStack() as inside:
            try:
                inside.enter_context(self._context.page_streams.enter())
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
            await self._run_until_drained(scope, receive, _without_cors(send))

    async def _run_until_drained(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one of Gradio's streams, which last until the browser disconnects; end it when the server drains."""
        started = complete = False

        async def watching_send(message: Message) -> None:
            nonlocal started, complete
            started = True
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        running = asyncio.ensure_future(self._app(scope, receive, watching_send))
        try:
            while not running.done() and not self._context.draining.is_set():
                await asyncio.wait([running], timeout=LOOK_SECONDS)
            if running.done():
                running.result()
                return
        finally:
            running.cancel()
        await asyncio.wait([running])
        if started and not complete:
            await send({"type": "http.response.body", "body": b""})


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"] == "/" and scope["method"] in ("GET", "HEAD"):
        await RedirectResponse("/login", 303)(scope, receive, send)
        return
    error = ApiError(401, "invalid_api_key", "Sign in first.", kind="authentication_error")
    await error.response()(scope, receive, send)


def _is_closed(path: str) -> bool:
    """Return whether the page has no route at a path.

    Names longer than a file system allows are blocked, because looking one up is an error.
    """
    too_long = any(len(name.encode()) > _LONGEST_NAME for name in path.split("/"))
    return too_long or (path not in _PAGES and not path.startswith(_ASSETS))


def _is_strange(body: bytes) -> bool:
    """Return whether the page cannot have sent this event.

    That is invalid JSON, a file, or a number beyond JavaScript's safe integers.
    """

    def walk(value: Any) -> bool:
        if isinstance(value, dict):
            return "path" in value or any(map(walk, value.values()))
        if isinstance(value, list):
            return any(map(walk, value))
        return isinstance(value, int) and abs(value) > _LARGEST_NUMBER

    try:
        return walk(json.loads(body))
    except (ValueError, RecursionError):
        return True


def _without_cors(send: Send) -> Send:
    """Remove Gradio's CORS headers, which let pages on other ports of this machine read responses."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = message.get("headers", ())
            message = {**message, "headers": [item for item in headers if not item[0].startswith(b"access-control-")]}
        await send(message)

    return sending


def _with_policy(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            if headers.get("content-type", "").startswith("text/html"):
                headers["Content-Security-Policy"] = POLICY
                headers["Referrer-Policy"] = "same-origin"  # with no-referrer, a form's Origin would be null
        await send(message)

    return sending
