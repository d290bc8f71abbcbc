"""What every route needs: the store, the model, the settings, who is asking."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fastapi import Request
from starlette.datastructures import Headers
from starlette.requests import cookie_parser

from wanduet.frontends.http_errors import ApiError, unavailable
from wanduet.frontends.http_keys import LOCAL_OWNER, KeyRing
from wanduet.frontends.http_metrics import ServerMetrics, WorkerView
from wanduet.frontends.http_schemas import RequestLimits
from wanduet.frontends.http_security import is_loopback
from wanduet.jobs.records import Limits
from wanduet.jobs.store import JobStore
from wanduet.specs import ModelSpec

KEY_COOKIE = "wanduet_key"  # set by the page's login; only this host's own pages send it
BUSY_RETRY_SECONDS = 1
DRAIN_RETRY_SECONDS = 15


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How a server listens and what it takes. `max_submissions` and `max_streams`: at the same moment."""

    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 2**20
    max_submissions: int = 256
    max_streams: int = 64
    stream_poll_seconds: float = 0.5
    queue: Limits = field(default_factory=lambda: Limits(queue=1000, per_owner=100))
    limits: RequestLimits = field(default_factory=RequestLimits)
    model_hash: str | None = None  # of the served weights: jobs are accepted for these and no others


class Gate:
    """Lets so many in at once and turns the others away, with a time to come back."""

    def __init__(self, limit: int, what: str) -> None:
        self._limit = limit
        self._what = what
        self._inside = 0
        self._guard = threading.Lock()

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Be inside during the block. Raises ApiError (503)."""
        with self._guard:
            if self._inside >= self._limit:
                raise unavailable("overloaded", f"There are too many {self._what} just now.", BUSY_RETRY_SECONDS)
            self._inside += 1
        try:
            yield
        finally:
            with self._guard:
                self._inside -= 1


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
        self.draining = threading.Event()
        self.submissions = Gate(settings.max_submissions, "submissions")
        self.streams = Gate(settings.max_streams, "event streams")

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
        raise ApiError(
            401,
            "invalid_api_key",
            "A valid API key is needed: `Authorization: Bearer KEY`.",
            kind="authentication_error",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return owner
