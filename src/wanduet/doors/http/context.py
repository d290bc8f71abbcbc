"""What every route needs: the store, the model, the settings, who is asking."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from fastapi import Request
from starlette.datastructures import Headers
from starlette.requests import cookie_parser

from wanduet.doors.http.capacity import find_capacity
from wanduet.doors.http.errors import ApiError, unavailable
from wanduet.doors.http.gates import Gate
from wanduet.doors.http.keys import LOCAL_OWNER, KeyRing
from wanduet.doors.http.metrics import OWNER, ServerMetrics, WorkerView
from wanduet.doors.http.schemas import RequestLimits
from wanduet.doors.http.security import is_loopback
from wanduet.family.specs import ModelSpec
from wanduet.jobs.library_logs import RateLimit
from wanduet.jobs.records import Limits
from wanduet.jobs.store import JobStore

KEY_COOKIE = "wanduet_key"  # set by the page's login; only this host's own pages send it
DRAIN_RETRY_SECONDS = 15
MAX_UPLOADS = 4  # at the same moment: each costs temporary files and a process
UPLOAD_SHARE = 2  # of one key


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How a server listens and what it takes. `max_submissions` and `max_streams`: at the same moment.

    `max_connections`: as many as the process may have files open for, by default. A client has `header_seconds` to
    send what comes before a body, `body_seconds` for the body, longer if it is on its way, and must take some of
    its answer every `stall_seconds`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 2**20
    max_submissions: int = 256
    max_streams: int = 64
    max_streams_per_key: int = 16
    max_connections: int | None = None
    header_seconds: float = 10.0
    body_seconds: float = 20.0
    stall_seconds: float = 60.0
    stream_poll_seconds: float = 0.5
    queue: Limits = field(default_factory=lambda: Limits(queue=1000, per_owner=100))
    limits: RequestLimits = field(default_factory=RequestLimits)
    model_hash: str | None = None  # of the served weights: jobs are accepted for these and no others


class ServerContext:
    """One server's belongings, in `app.state.context`."""

    def __init__(
        self,
        store: JobStore,
        spec: ModelSpec,
        settings: ServerSettings,
        keys: KeyRing,
        worker_ready: Callable[[], bool] = lambda: True,
        worker: WorkerView | None = None,
    ) -> None:
        self.store = store
        self.spec = spec
        self.settings = settings
        self.keys = keys
        self.worker_ready = worker_ready
        self.worker = worker
        # Decided once: removing the last key, or its file, must close the server and not open it to everybody.
        self.require_key = not is_loopback(settings.host) or bool(keys.records())
        self.metrics = ServerMetrics(store, worker)
        self.failures = RateLimit()  # how often they are logged
        self.draining = threading.Event()
        self.capacity = find_capacity(settings.max_connections)
        third = max(1, self.capacity.requests // 3)  # for streams, for pages, and the rest for short answers
        self.requests = Gate(self.capacity.requests, "requests")
        self.submissions = Gate(settings.max_submissions, "submissions")
        self.streams = Gate(min(settings.max_streams, third), "event streams", settings.max_streams_per_key)
        self.page_streams = Gate(min(2 * settings.max_streams, third), "open pages")  # each has two
        self.uploads = Gate(MAX_UPLOADS, "uploads", UPLOAD_SHARE if self.require_key else None)

    def check_accepting(self) -> None:
        """Raises ApiError (503) while the server drains."""
        if self.draining.is_set():
            raise unavailable("shutting_down", "The server is shutting down.", DRAIN_RETRY_SECONDS)


def get_context(request: Request) -> ServerContext:
    """The context of the server that got a request."""
    context: ServerContext = request.app.state.context
    return context


def find_owner(context: ServerContext, headers: Headers) -> str | None:
    """Who is asking, by the key in the headers or in the page's cookie; None if a key is needed and none is valid."""
    keys = context.keys
    if not context.require_key and not keys.records():
        return LOCAL_OWNER
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return keys.owner(key.strip())
    cookies = cookie_parser(headers.get("cookie", ""))
    return keys.owner(cookies[KEY_COOKIE]) if KEY_COOKIE in cookies else None


def get_owner(request: Request) -> str:
    """Who is asking, by their key; everybody is one owner where there are no keys. Raises ApiError (401)."""
    owner = find_owner(get_context(request), request.headers)
    if owner is None:
        raise invalid_key()
    setattr(request.state, OWNER, owner)
    return owner


def invalid_key() -> ApiError:
    """The answer to whoever has no valid key."""
    return ApiError(
        401,
        "invalid_api_key",
        "A valid API key is needed: `Authorization: Bearer KEY`.",
        kind="authentication_error",
        headers={"WWW-Authenticate": "Bearer"},
    )
