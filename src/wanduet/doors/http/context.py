"""State that every route shares (store, model, settings), and authentication of requests."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter
from fastapi import Request
from starlette.datastructures import Headers
from starlette.requests import cookie_parser

from wanduet.doors.http.capacity import find_capacity
from wanduet.doors.http.errors import ApiError, unavailable
from wanduet.doors.http.gates import Gate
from wanduet.doors.http.keys import LOCAL_OWNER, KeyRing
from wanduet.doors.http.lora_fields import take_loras
from wanduet.doors.http.loras import LoraFolder
from wanduet.doors.http.metrics import OWNER, ServerMetrics, WorkerView
from wanduet.doors.http.schemas import RequestLimits, Video, to_request, to_video
from wanduet.doors.http.security import is_loopback
from wanduet.family.attention import FIELD as QUANTIZE_ATTENTION
from wanduet.family.spec import ModelSpec
from wanduet.family.speeds import Price
from wanduet.jobs.library_logs import RateLimit
from wanduet.jobs.records import Limits, StoredJob
from wanduet.jobs.store import JobStore
from wanduet.jobs.webhooks import WebhookSettings
from wanduet.loras import Lora
from wanduet.planning.prices import loss_of
from wanduet.request import GenerationRequest
from wanduet.source_video import SourceVideo

KEY_COOKIE = "wanduet_key"  # set by the page's login; browsers send it only with requests from this host's own pages
DRAIN_RETRY_SECONDS = 15
MAX_UPLOADS = 4  # at one time: each costs disk space and a process
UPLOAD_SHARE = 2  # of `MAX_UPLOADS`, for one key
UPLOAD_THREADS = 2  # that write uploads, and that wait for processes which read them


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Address, limits and access rules of a server.

    `max_submissions` and `max_streams` limit how many run at one time. `max_connections` defaults to as many as the
    process's limit of open files allows. Timeouts: a client must send the request's head within `header_seconds` and
    its body within `body_seconds` (longer while the body keeps arriving), and must read some of the response every
    `stall_seconds`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 2**20
    max_input_bytes: int = 2**28  # of the video that a video is made from
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
    webhooks: WebhookSettings = field(default_factory=WebhookSettings)
    model_hash: str | None = None  # of the served weights: only jobs for this hash are accepted
    # Whether a loss budget may choose attention in 8 bits where it was measured: the worker must have the devices of the measurement.
    chooses_attention: bool = False
    lora_dir: Path | None = None  # the folder of the LoRA that requests may name; None: they may name none


class ServerContext:
    """The state of one server, in `app.state.context`."""

    def __init__(
        self,
        store: JobStore,
        spec: ModelSpec,
        settings: ServerSettings,
        keys: KeyRing,
        worker: WorkerView | None = None,
    ) -> None:
        self.store = store
        self.spec = spec
        self.settings = settings
        self.keys = keys
        self.loras = LoraFolder(settings.lora_dir, spec, settings.limits)
        self.worker = worker
        # Decided once, at the start: removing the last key, or the key file, must not open the server to everybody.
        self.require_key = not is_loopback(settings.host) or bool(keys.records())
        self.metrics = ServerMetrics(store, worker)
        self.failures = RateLimit()  # limits how often failures are logged
        self.draining = threading.Event()
        self.capacity = find_capacity(settings.max_connections)
        third = max(1, self.capacity.requests // 3)  # a third each for streams, for pages, and for short requests
        self.requests = Gate(self.capacity.requests, "requests")
        self.submissions = Gate(settings.max_submissions, "submissions")
        self.streams = Gate(min(settings.max_streams, third), "event streams", settings.max_streams_per_key)
        self.page_streams = Gate(min(2 * settings.max_streams, third), "open pages")  # one each
        # Separate thread limits: uploads must not occupy the threads of the routes.
        self.writers, self.readers = CapacityLimiter(UPLOAD_THREADS), CapacityLimiter(UPLOAD_THREADS)
        self.uploads = Gate(MAX_UPLOADS, "uploads", UPLOAD_SHARE if self.require_key else None)

    def price(self, settings: Mapping[str, Any]) -> Price | None:
        """Return what a set of approximations loses with the served weights on this machine; None if that was not measured, and
        for attention in 8 bits if it is not to be chosen."""
        if QUANTIZE_ATTENTION in settings and not self.settings.chooses_attention:
            return None
        return loss_of(self.store.files.folder / "measurements", self.settings.model_hash, settings)

    def show(self, *jobs: StoredJob) -> list[Video]:
        """Convert stored jobs to video objects; a queued one says why no worker takes jobs, if so. Reads files."""
        trouble = self.trouble if any(job.status == "queued" for job in jobs) else None
        return [to_video(job, trouble) for job in jobs]

    def to_request(self, fields: dict[str, Any], look: Callable[[], SourceVideo] | None = None) -> GenerationRequest:
        """`schemas.to_request` with this server's model, limits and LoRA, which get the hashes of their files.

        A LoRA's file that has not been read before is read whole: call it in a thread. Raises InvalidRequestError.
        """
        values, spec = dict(fields), self.spec
        take_loras(values)
        if values.get("loras"):
            loras, spec = self.loras.resolve([Lora(**lora) for lora in values["loras"]])
            values["loras"] = [lora.model_dump() for lora in loras]
        return to_request(values, spec, self.settings.limits, look, self.price)

    @property
    def trouble(self) -> str | None:
        """Why no worker takes jobs; None if one does, or if other processes have the workers."""
        return None if self.worker is None else self.worker.trouble

    def check_accepting(self) -> None:
        """Raise ApiError (503) while the server drains."""
        if self.draining.is_set():
            raise unavailable("shutting_down", "The server is shutting down.", DRAIN_RETRY_SECONDS)


def get_context(request: Request) -> ServerContext:
    """Return the context of the server that received a request."""
    context: ServerContext = request.app.state.context
    return context


def find_owner(context: ServerContext, headers: Headers) -> str | None:
    """Return the owner of the key in the headers or the page's cookie; None if a key is required and none is valid."""
    keys = context.keys
    if not context.require_key and not keys.records():
        return LOCAL_OWNER
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return keys.owner(key.strip())
    cookies = cookie_parser(headers.get("cookie", ""))
    return keys.owner(cookies[KEY_COOKIE]) if KEY_COOKIE in cookies else None


def get_owner(request: Request) -> str:
    """Return the owner of a request's key; without keys, all requests have one owner. Raises ApiError (401)."""
    owner = find_owner(get_context(request), request.headers)
    if owner is None:
        raise invalid_key()
    setattr(request.state, OWNER, owner)
    return owner


def invalid_key() -> ApiError:
    """Return the error for a request without a valid key."""
    return ApiError(
        401,
        "invalid_api_key",
        "A valid API key is needed: `Authorization: Bearer KEY`.",
        kind="authentication_error",
        headers={"WWW-Authenticate": "Bearer"},
    )
