"""Calls when a job has ended: signed, sent again until they succeed, and only where the operator allows."""

import base64
import http.server
import json
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import sqlalchemy as sa
from openai import OpenAI

from wanduet.errors import ConfigError, InvalidRequestError
from wanduet.jobs.records import JobError, NewJob
from wanduet.jobs.schema import webhooks
from wanduet.jobs.store import JobStore
from wanduet.jobs.webhooks import PAUSES, WebhookSender, WebhookSettings, post, sign

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
URL = "http://backend:9000/done?from=wanduet"
SETTINGS = WebhookSettings.parse(SECRET, URL, ["Hooks.example.org"])
THEIRS = "https://hooks.example.org/a"


class Receiver:
    """What arrives, and the status that each call is answered with (200 where there is none left)."""

    def __init__(self, *answers: int | Exception) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[str, bytes, Mapping[str, str], bool]] = []

    def __call__(self, *call: Any) -> int:
        self.calls.append(call)
        answer = self.answers.pop(0) if self.answers else 200
        if isinstance(answer, Exception):
            raise answer
        return answer


def submit(store: JobStore, *urls: str) -> str:
    return store.submit(NewJob("ann", "m", {"prompt": "a secret"}, webhooks=urls or (URL,))).job.id


def fail(store: JobStore) -> None:
    lease = store.claim("w", 30.0)
    assert lease is not None
    store.fail(lease, JobError("out_of_memory", "a secret detail"))


def rows(store: JobStore) -> int:
    with store.database.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(webhooks)) or 0


def test_a_job_that_ends_is_told_once_signed_and_without_its_prompt(store: JobStore) -> None:
    receiver = Receiver()
    sender = WebhookSender(store, SETTINGS, receiver, lambda: 1_700_000_000.9)
    job_id = submit(store)
    assert sender.send_due() == 0, "it has not ended"
    fail(store)
    assert (sender.send_due(), sender.send_due(), rows(store)) == (1, 0, 0)
    ((url, body, headers, public_only),) = receiver.calls
    assert (url, public_only) == (URL, False)
    event = json.loads(body)
    assert (event["type"], event["id"]) == ("video.failed", headers["webhook-id"])
    assert event["data"] == {"id": job_id, "object": "video", "status": "failed", "error": {"code": "out_of_memory"}}
    assert b"secret" not in body
    assert headers == sign(bytes(range(32)), event["id"], 1_700_000_000, body)


def test_openais_client_accepts_the_signature() -> None:
    client = OpenAI(api_key="none")
    body = b'{"id": "evt_1"}'
    headers = sign(bytes(range(32)), "evt_1", 1_700_000_000, body)
    client.webhooks.verify_signature(body.decode(), headers, secret=SECRET, tolerance=10**9)
    with pytest.raises(ValueError, match="signature"):
        client.webhooks.verify_signature(body.decode() + " ", headers, secret=SECRET, tolerance=10**9)


def test_a_call_that_fails_is_sent_again_later_and_after_a_restart(store: JobStore) -> None:
    now = [1000.0]
    submit(store)
    fail(store)
    receiver = Receiver(503, ConnectionRefusedError(), 302)
    for pause in PAUSES[:3]:
        sender = WebhookSender(store, SETTINGS, receiver, lambda: now[0])  # each time another process
        sender.send_due()
        now[0] += pause - 1.0
        sender.send_due()
        now[0] += 1.0
    assert (len(receiver.calls), rows(store)) == (3, 1)
    WebhookSender(store, SETTINGS, receiver, lambda: now[0]).send_due()
    assert (len(receiver.calls), rows(store)) == (4, 0)
    assert len({headers["webhook-id"] for _, _, headers, _ in receiver.calls}) == 1


@pytest.mark.parametrize(("status", "calls"), [(500, len(PAUSES) + 1), (410, 1)])
def test_it_is_given_up_in_the_end(store: JobStore, status: int, calls: int) -> None:
    now = [1000.0]
    submit(store)
    fail(store)
    receiver = Receiver(*[status] * 100)
    sender = WebhookSender(store, SETTINGS, receiver, lambda: now[0])
    for _ in range(20):
        sender.send_due()
        now[0] += max(PAUSES)
    assert (len(receiver.calls), rows(store)) == (calls, 0)


def test_two_senders_do_not_send_the_same_call(store: JobStore) -> None:
    submit(store)
    fail(store)
    other = WebhookSender(store, SETTINGS, Receiver())
    sent: list[int] = []

    def send(*_: Any) -> int:
        sent.append(other.send_due())
        return 200

    assert WebhookSender(store, SETTINGS, send).send_due() == 1
    assert sent == [0]


def test_a_deleted_job_is_not_told(store: JobStore) -> None:
    job_id = submit(store)
    fail(store)
    store.delete(job_id)
    assert rows(store) == 0


def test_a_clients_host_is_public_and_still_allowed(store: JobStore) -> None:
    receiver = Receiver()
    for settings in (SETTINGS, WebhookSettings.parse(SECRET, URL, [])):
        submit(store, *SETTINGS.targets(THEIRS))
        fail(store)
        WebhookSender(store, settings, receiver).send_due()
    assert [(url, public_only) for url, _, _, public_only in receiver.calls] == [
        (URL, False), (THEIRS, True), (URL, False)
    ]  # fmt: skip
    assert rows(store) == 0


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.org/a", "https://hooks.example.org:8443/a", "https://other.example.org/a",
        "https://hooks.example.org@10.0.0.1/a", "https://u@hooks.example.org/a", "https://hooks.example.org/a\r\nx: y",
        "https://hooks.example.org.evil.org/a", "file:///etc/passwd", "https://[", 7, "",
    ],
)  # fmt: skip
def test_other_addresses_are_refused(url: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"hooks\.example\.org"):
        SETTINGS.targets(url)
    assert SETTINGS.targets() == (URL,)


def test_a_host_with_a_private_address_is_not_called() -> None:
    for host in ("127.0.0.1", "localhost", "[::1]", "169.254.169.254"):
        with pytest.raises(PermissionError):
            post(f"https://{host}/", b"", {}, True)


def test_a_call_is_a_post_of_json() -> None:
    seen: list[tuple[str, str | None, bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            seen.append((self.path, self.headers["webhook-id"], body))
            self.send_response(302)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            status = post(f"http://127.0.0.1:{server.server_port}/a?b=c", b"{}", {"webhook-id": "evt_1"}, False)
        finally:
            server.shutdown()
            thread.join()
    assert (status, seen) == (302, [("/a?b=c", "evt_1", b"{}")])


@pytest.mark.parametrize(
    ("secret", "url"), [(None, URL), ("whsec_short", URL), ("whsec_???", URL), (SECRET, "ftp://x")]
)
def test_flags_that_cannot_work_are_refused(secret: str | None, url: str) -> None:
    with pytest.raises(ConfigError):
        WebhookSettings.parse(secret, url, [])


def test_a_suggested_secret_works() -> None:
    with pytest.raises(ConfigError) as refused:
        WebhookSettings.parse(None, URL, [])
    made = str(refused.value.hint).rpartition("WANDUET_WEBHOOK_SECRET=")[2]
    assert WebhookSettings.parse(made, URL, []).url == URL
