"""Webhooks: an HTTP request to an address of the operator's choice when a job has completed or failed.

Signed as Standard Webhooks says (https://www.standardwebhooks.com). Each is a row of the job database from the job's
submission on, so that it is sent after a restart, too; it is deleted with its job. A receiver may get one twice, with
the same `webhook-id`.
"""

import base64
import binascii
import hashlib
import hmac
import http.client
import ipaddress
import json
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import sqlalchemy as sa
import structlog

from wanduet.errors import ConfigError, InvalidRequestError
from wanduet.jobs.logs import describe_error
from wanduet.jobs.schema import SERIAL, jobs, webhooks
from wanduet.jobs.store import JobStore

log = structlog.get_logger(__name__)

FIELD = "webhook_url"
PREFIX = "whsec_"  # of a secret, before its bytes in Base64
PAUSES = (5.0, 60.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 72000.0)  # seconds after each failed try
MAX_URL = 2048
_LOOK_SECONDS = 1.0
_AT_ONCE = 16  # requests of one look
_CONNECT_SECONDS, _WHOLE_SECONDS = 10.0, 20.0
_WRITE_SECONDS = 5.0

Send = Callable[[str, bytes, Mapping[str, str], bool], int]


@dataclass(frozen=True, slots=True)
class WebhookSettings:
    """Where webhooks go; nowhere by default. `url`: of all jobs. `hosts`: names of hosts that a client may choose for a job of its own."""

    secret: bytes = field(default=b"", repr=False)
    url: str | None = None
    hosts: tuple[str, ...] = ()

    @classmethod
    def parse(cls, secret: str | None, url: str | None, hosts: Sequence[str]) -> "WebhookSettings":
        """Return the settings of these flags. Raises ConfigError."""
        if url is None and not hosts:
            return cls()
        if url is not None and not _is_address(url, ("http", "https")):
            raise ConfigError("webhook_url is no address.", hint="For example https://example.org/videos-done.")
        try:
            key = base64.b64decode((secret or "").removeprefix(PREFIX), validate=True)
        except binascii.Error:
            key = b""
        if len(key) < 24:
            made = PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()
            raise ConfigError(
                f"Webhooks need a secret that the receiver knows, too: {PREFIX} and at least 24 bytes in Base64.",
                hint=f"A new one: WANDUET_WEBHOOK_SECRET={made}",
            )
        return cls(key, url, tuple(host.lower() for host in hosts))

    def targets(self, given: object = None) -> tuple[str, ...]:
        """Return the addresses for a job. `given`: what its client chose, if anything. Raises InvalidRequestError."""
        chosen = () if given is None else (self.check(given),)
        return chosen if self.url is None else (self.url, *chosen)

    def check(self, url: object) -> str:
        """Return an address that a client chose. Raises InvalidRequestError if it is not allowed."""
        if not isinstance(url, str) or not _is_address(url, ("https",)) or urlsplit(url).hostname not in self.hosts:
            hosts = ", ".join(self.hosts) or "none"
            raise InvalidRequestError(FIELD, str(url), f"https://HOST/..., on one of this server's hosts: {hosts}")
        return url


def _is_address(url: str, schemes: Sequence[str]) -> bool:
    """Return whether a URL names a host at the scheme's own port, or for `http` at any, and no user."""
    if len(url) > MAX_URL or not url.isascii() or not url.isprintable() or " " in url:
        return False
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    allowed_port = "http" in schemes or port in (None, 443)
    return parts.scheme in schemes and bool(parts.hostname) and parts.username is None and allowed_port


def sign(secret: bytes, message_id: str, moment: int, body: bytes) -> dict[str, str]:
    """Return a message's headers. `moment`: Unix seconds of this try."""
    signed = f"{message_id}.{moment}.".encode() + body
    signature = base64.b64encode(hmac.digest(secret, signed, hashlib.sha256)).decode()
    return {"webhook-id": message_id, "webhook-timestamp": str(moment), "webhook-signature": f"v1,{signature}"}


class _Pinned(http.client.HTTPSConnection):
    """A connection to one address of a host, whose certificate is checked for the host's name."""

    def __init__(self, host: str, port: int, address: str) -> None:
        super().__init__(host, port, timeout=_CONNECT_SECONDS)
        self._address = address

    def connect(self) -> None:
        """Connect to the address."""
        plain = socket.create_connection((self._address, self.port), _CONNECT_SECONDS)
        self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)


def post(url: str, body: bytes, headers: Mapping[str, str], public_only: bool) -> int:
    """Send a request without following redirects; return its status. Raises OSError, HTTPException.

    `public_only` refuses a host that has an address in a private network, or on this machine.
    """
    parts = urlsplit(url)
    host, is_tls = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if is_tls else 80)
    connection: http.client.HTTPConnection
    if public_only:
        connection = _Pinned(host, port, _public_address(host, port))
    else:
        kind = http.client.HTTPSConnection if is_tls else http.client.HTTPConnection
        connection = kind(host, port, timeout=_CONNECT_SECONDS)

    def cut_off() -> None:
        with suppress(OSError, AttributeError):
            connection.sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(_WHOLE_SECONDS, cut_off)
    timer.start()
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request(
            "POST", target, body, {"content-type": "application/json", "user-agent": "wanduet", **headers}
        )
        return connection.getresponse().status
    finally:
        timer.cancel()
        connection.close()


def _public_address(host: str, port: int) -> str:
    """Resolve a host once. Raises OSError if one of its addresses is not public."""
    found = [str(one[4][0]) for one in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for address in found:
        if not ipaddress.ip_address(address.partition("%")[0]).is_global:
            raise PermissionError(f"{host} has an address that is not public")
    return found[0]


class WebhookSender:
    """Sends the webhooks of finished jobs from a thread of its own. Of several senders, one takes each try."""

    def __init__(
        self, store: JobStore, settings: WebhookSettings, send: Send = post, clock: Callable[[], float] = time.time
    ) -> None:
        self._store, self._settings, self._send, self._clock = store, settings, send, clock
        self._stopping = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        """Stop. A try that has begun may go on, as a daemon thread; its row stays until it has succeeded."""
        self._stopping.set()
        self._thread.join(_LOOK_SECONDS)

    def _run(self) -> None:
        while not self._stopping.wait(_LOOK_SECONDS):
            try:
                self.send_due()
                self._failing = False
            except Exception as error:  # the database is locked or away, for example
                if not self._failing:
                    log.warning("webhooks are put off", **describe_error(error))
                self._failing = True

    def send_due(self) -> int:
        """Send what is due; return how many were sent. Raises SQLAlchemyError."""
        due = (
            sa.select(webhooks, jobs.c.status, jobs.c.error_code, jobs.c.completed_at)
            .join(jobs, jobs.c.id == webhooks.c.job)
            .where(webhooks.c.next_at <= self._clock(), jobs.c.status.in_(("completed", "failed")))
            .order_by(webhooks.c.next_at)
            .limit(_AT_ONCE)
        )
        with self._store.database.connect() as connection:
            rows = connection.execute(due).all()
        return sum(self._try(row) for row in rows if not self._stopping.is_set())

    def _try(self, row: "sa.Row[Any]") -> bool:
        pause = PAUSES[min(row.tries, len(PAUSES) - 1)]
        mine = sa.and_(webhooks.c.id == row.id, webhooks.c.tries == row.tries)
        taken = self._write(sa.update(webhooks).where(mine).values(tries=row.tries + 1, next_at=self._clock() + pause))
        if not taken:  # by another sender, or deleted
            return False
        about = {"job": row.job, "host": urlsplit(row.url).hostname, "tries": row.tries + 1}
        problem, lasting = self._deliver(row)
        if problem is None:
            log.info("webhook sent", **about)
        elif lasting or row.tries + 1 > len(PAUSES):
            log.error("webhook given up", problem=problem, **about)
        else:
            log.warning("webhook not sent", problem=problem, next_in=pause, **about)
            return False
        self._write(sa.delete(webhooks).where(webhooks.c.id == row.id))
        return problem is None

    def _deliver(self, row: "sa.Row[Any]") -> tuple[str | None, bool]:
        """Return what went wrong (None: nothing), and whether it would again."""
        is_own = row.url == self._settings.url
        if not is_own:
            try:
                self._settings.check(row.url)
            except InvalidRequestError:
                return "its host is not allowed any more", True
        body = _body(row)
        try:
            status = self._send(
                row.url, body, sign(self._settings.secret, row.id, int(self._clock()), body), not is_own
            )
        except (OSError, http.client.HTTPException, ValueError) as error:
            return type(error).__name__, False
        return (None, False) if 200 <= status < 300 else (f"status {status}", status == 410)

    def _write(self, statement: "sa.Update | sa.Delete") -> int:
        options = {SERIAL: time.monotonic() + _WRITE_SECONDS}
        with self._store.database.connect().execution_options(**options) as connection, connection.begin():
            return connection.execute(statement).rowcount


def _body(row: "sa.Row[Any]") -> bytes:
    """Return the message: which job ended, and how. Its prompt and its video are for those who have a key."""
    error = None if row.error_code is None else {"code": row.error_code}
    event = {
        "id": row.id,
        "object": "event",
        "type": f"video.{row.status}",
        "created_at": int(row.completed_at or 0),
        "data": {"id": row.job, "object": "video", "status": row.status, "error": error},
    }
    return json.dumps(event).encode()
