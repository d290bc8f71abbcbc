"""Clients that are slow, silent or no clients at all, at a real socket: each costs one connection for a limited time."""

import errno
import json
import logging
import signal
import socket
import threading
import time
from asyncio.selector_events import BaseSelectorEventLoop
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h11
import pytest
from listening import WAIT, Answer, Listening, listening, request
from structlog.testing import capture_logs

from wanduet.doors.http import limits, listen
from wanduet.doors.http.context import ServerSettings
from wanduet.doors.http.server import _run_both
from wanduet.jobs.records import OutputFile

HALF = b"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le"
LATE = {"header_seconds": 0.3, "body_seconds": 0.3}  # for clients that send; others have what a busy machine needs
STALLED = {"stall_seconds": 0.3}  # for clients that do not read
PROMPT = json.dumps({"prompt": "x"}).encode()


@pytest.fixture
def serve(make_api: Any) -> Any:
    @contextmanager
    def serve(**settings: Any) -> Iterator[Listening]:
        with listening(make_api(ServerSettings(**{"stream_poll_seconds": 0.01, **settings}))) as server:
            yield server

    return serve


def test_half_sent_requests_give_way_to_new_clients(serve: Any) -> None:
    with serve(max_connections=8) as server, ExitStack() as clients:
        slow = [clients.enter_context(server.connect(HALF)) for _ in range(30)]
        for _ in range(10):
            assert server.ask("GET", "/v1/videos").status == 200
        answer = Answer.read(slow[0])
        assert (answer.status, answer.code) == (408, "request_timeout")


def test_a_crowd_of_half_sent_requests_costs_no_pause_for_each(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "_GRACE_SECONDS", 3600.0)  # of which one that nobody waits behind is given all
    with serve(max_connections=4) as server, ExitStack() as clients:
        for _ in range(20):
            clients.enter_context(server.connect(HALF))
        polite = clients.enter_context(server.connect(request("GET", "/health", b"", "Connection: close")))
        clients.enter_context(server.connect(HALF))
        assert Answer.read(polite).status == 200


def test_a_system_that_gives_no_connection_is_asked_again_and_logged_once(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([OSError(errno.EMFILE, "Too many open files")] * 5)
    real = BaseSelectorEventLoop.sock_accept

    async def accept(loop: Any, listener: socket.socket) -> Any:
        for failure in failures:
            raise failure
        return await real(loop, listener)

    monkeypatch.setattr(BaseSelectorEventLoop, "sock_accept", accept)
    with capture_logs() as lines, serve() as server:
        assert server.ask("GET", "/v1/videos").status == 200
    accepting = [line for line in lines if not line["event"].startswith("stopping")]
    assert [(line["event"], line["number"]) for line in accepting] == [("a client could not be accepted", errno.EMFILE)]


def test_connections_that_are_kept_open_give_way_too(serve: Any) -> None:
    with serve(max_connections=8) as server, ExitStack() as clients:
        for _ in range(20):
            client = clients.enter_context(server.connect(request("GET", "/health")))
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
        assert server.ask("GET", "/v1/videos").status == 200


def test_when_all_are_answered_others_are_refused_with_a_time(serve: Any) -> None:
    with serve(max_connections=8) as server, ExitStack() as clients:
        for _ in range(4):
            clients.enter_context(server.connect(request("POST", "/v1/videos", PROMPT)[:-1]))
        for answer in iter(lambda: server.ask("GET", "/v1/videos"), None):
            if answer.status == 503:
                break
        assert answer.code == "overloaded"
        assert "retry-after: 1" in answer.head
        assert server.ask("GET", "/health").status == 200, "that it lives is always said"
    with serve(max_connections=8) as server:
        assert server.ask("GET", "/v1/videos").status == 200


@pytest.mark.parametrize("sent", [b"", b"GET", HALF])
def test_a_request_must_come_in_time(serve: Any, sent: bytes) -> None:
    with serve(**LATE) as server, server.connect(sent) as client:
        assert Answer.read(client).status in (0, 408)


def test_headers_that_come_byte_by_byte_must_end_in_time(serve: Any) -> None:
    with serve(**LATE) as server, server.connect(HALF) as client:
        client.settimeout(0.02)
        data = b""
        with suppress(ConnectionError):
            while not data:
                client.sendall(b"x")
                with suppress(TimeoutError):
                    data = client.recv(65536)
        assert Answer(data).status in (0, 408)


def test_bodies_that_do_not_come_keep_no_submission_out(serve: Any) -> None:
    with serve(max_submissions=1) as server, ExitStack() as clients:
        for _ in range(3):
            clients.enter_context(server.connect(request("POST", "/v1/videos", PROMPT)[:-1]))
        assert server.ask("POST", "/v1/videos", {"prompt": "x"}).status == 200
        assert len(server.api.store.list().jobs) == 1


def test_a_body_must_come_in_time(serve: Any) -> None:
    with serve(**LATE) as server:
        with server.connect(request("POST", "/v1/videos", PROMPT)[:-1]) as client:
            answer = Answer.read(client)
        assert (answer.status, answer.code) == (408, "request_timeout")
        assert server.api.store.list().jobs == ()


def test_a_body_that_ends_before_its_stated_length_stores_nothing(serve: Any) -> None:
    with serve() as server:
        with server.connect(request("POST", "/v1/videos", PROMPT)[:-1]) as client:
            client.shutdown(socket.SHUT_WR)
            assert Answer.read(client).status in (0, 400)
        assert server.ask("GET", "/v1/videos").status == 200
        assert server.api.store.list().jobs == ()


def test_a_body_that_goes_on_after_its_stated_length_is_not_part_of_it(serve: Any) -> None:
    with serve() as server:
        with server.connect(request("POST", "/v1/videos", PROMPT) + b"}" * 1000 + b"\r\n\r\n") as client:
            answers = Answer.read(client)
        assert answers.status == 200
        assert b"HTTP/1.1 400 " in answers.body, "the rest is no request"
        assert len(server.api.store.list().jobs) == 1


@pytest.mark.parametrize(("path", "status"), [("/v1/videos", 413), ("/v1/models", 405), ("/nothing", 404)])
def test_a_body_without_end_is_not_read_without_end(serve: Any, path: str, status: int) -> None:
    with serve(header_seconds=1.5, body_seconds=WAIT, max_body_bytes=1000) as server:
        head = request("POST", path, b"", "Transfer-Encoding: chunked", "Content-Type: application/json")
        with server.connect(head) as client:
            assert Answer(send_without_end(client)).status == status


def send_without_end(client: socket.socket) -> bytes:
    """Send chunks until the server ends the connection; what it answered first."""
    answer = b""
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        try:
            client.sendall(b"64\r\n" + b"x" * 100 + b"\r\n")
            client.settimeout(0.001 if not answer else WAIT)
            with suppress(TimeoutError):
                answer = answer or client.recv(65536)
        except ConnectionError:
            return answer
    raise AssertionError("the body was read without end")


@pytest.mark.parametrize(
    ("path", "size", "status"), [("/v1/videos", 2**23, 413), ("/v1/models", 2**20, 405), ("/nothing", 2**20, 404)]
)
def test_a_client_that_sends_all_before_it_reads_gets_the_refusal(
    serve: Any, path: str, size: int, status: int
) -> None:
    with serve() as server, server.connect() as client:
        client.sendall(request("POST", path, b"x" * size, "Connection: close"))
        assert Answer.read(client).status == status


def test_a_client_that_asks_first_is_refused_before_it_sends(serve: Any) -> None:
    with serve(max_body_bytes=1000) as server:
        ask = ("Expect: 100-continue", "Content-Type: application/json", "Connection: close")
        with server.connect(request("POST", "/v1/videos", b"", *ask, "Content-Length: 1001")) as client:
            assert Answer.read(client).status == 413
        head = request("POST", "/v1/videos", b"", *ask, f"Content-Length: {len(PROMPT)}")
        with server.connect(head) as client:
            assert client.recv(65536).startswith(b"HTTP/1.1 100 ")
            client.sendall(PROMPT)
            assert Answer.read(client).status == 200


def test_a_client_that_does_not_read_its_download_is_left(serve: Any) -> None:
    with serve(**STALLED) as server:
        video_id = finish_large(server)
        with server.connect(request("GET", f"/v1/videos/{video_id}/content"), receive_buffer=4096) as client:
            wait_for_reset(client)
        assert server.ask("HEAD", f"/v1/videos/{video_id}/content").status == 200


def test_a_slow_download_that_goes_on_is_finished(serve: Any) -> None:
    with serve(stall_seconds=2.0) as server:
        video_id = finish_large(server)
        path = f"/v1/videos/{video_id}/content"
        with server.connect(request("GET", path, b"", "Connection: close"), receive_buffer=4096) as client:
            assert len(Answer.read(client).body) == 2**23


def test_a_download_over_a_slow_line_goes_on_while_some_of_it_is_taken(serve: Any) -> None:
    """The system's own buffer of megabytes hides for minutes that such a client reads."""
    with serve(stall_seconds=1.0) as server:
        video_id = finish_large(server)
        with server.connect(request("GET", f"/v1/videos/{video_id}/content"), receive_buffer=4096) as client:
            for _ in range(25):  # more than twice as long as a client may take nothing
                assert client.recv(2**16, socket.MSG_WAITALL)
                threading.Event().wait(0.1)  # the slow line


def test_a_client_that_does_not_read_its_events_is_left(serve: Any) -> None:
    with serve(**STALLED, max_streams=1) as server:
        server.api.create(prompt="\N{FOX FACE}" * 8000)
        lease = server.api.claim()
        with server.connect(request("GET", f"/v1/videos/{lease.job.id}/events"), receive_buffer=4096) as client:
            assert client.recv(100)
            progress = 0.0
            while not is_reset(client, 0.01):
                progress += 1e-3
                server.api.store.progress(lease, progress, "denoise", progress * 1000)
        server.api.store.cancel(lease.job.id)
        while (answer := server.ask("GET", f"/v1/videos/{lease.job.id}/events")).status == 503:
            pass
        assert answer.status == 200, "its place is free again"


@pytest.mark.parametrize("sent", [b"no http at all\r\n\r\n", b"GET / HTTP/1.1\r\nHost: " + b"x" * 100_000])
def test_what_is_no_http_is_answered_in_json(serve: Any, sent: bytes) -> None:
    with serve() as server, server.connect() as client:
        with suppress(ConnectionError):
            client.sendall(sent)
        answer = Answer.read(client)
        assert (answer.status, answer.code) == (400, "invalid_request")
        assert server.ask("GET", "/health").status == 200


def test_nonsense_in_the_middle_of_an_answer_ends_the_connection(serve: Any, caplog: Any) -> None:
    with serve() as server:
        video_id = server.api.create()["id"]
        head = request("GET", f"/v1/videos/{video_id}/events", b"", "Transfer-Encoding: chunked")
        with server.connect(head) as client:
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
            client.sendall(b"no length\r\n")
            with suppress(ConnectionError):
                while client.recv(65536):
                    pass
        assert server.ask("GET", "/health").status == 200
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("answer_begun", [False, True])
def test_after_nonsense_nothing_more_is_sent_though_the_connection_is_not_lost_yet(answer_begun: bool) -> None:
    """Between the close and the loop's report of it, the application goes on."""
    connection = object.__new__(listen.Connection)
    connection.conn = h11.Connection(h11.SERVER)
    connection.conn.receive_data(b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    connection.conn.next_event()
    if answer_begun:
        connection.conn.send(h11.Response(status_code=200, headers=[]))
    connection.cycle = SimpleNamespace(response_complete=False, disconnected=False)  # type: ignore[assignment]
    done: list[str] = []
    connection.transport = SimpleNamespace(  # type: ignore[assignment]
        write=lambda data: done.append("write"), close=lambda: done.append("close"), abort=lambda: done.append("abort")
    )
    connection.send_400_response("nonsense")
    assert done == (["abort"] if answer_begun else ["write", "close"])
    assert connection.cycle.disconnected


def test_a_server_that_ends_does_not_wait_for_half_a_request(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DRAIN_BODY_SECONDS", 0.2)
    with serve() as server, ExitStack() as clients:
        silent, half = clients.enter_context(server.connect()), clients.enter_context(server.connect(HALF))
        body = clients.enter_context(server.connect(request("POST", "/v1/videos", PROMPT)[:-1]))
        while not server.server.server_state.tasks:
            server.ask("GET", "/health")
        server.ask_to_stop()
        answer = Answer.read(body)
        assert (answer.status, answer.code) == (503, "shutting_down")
        assert Answer.read(silent).status == Answer.read(half).status == 0
        assert server.ended()
        assert server.api.store.list().jobs == ()


def test_a_second_signal_ends_at_once_without_an_error(serve: Any, caplog: Any) -> None:
    with serve() as server, server.connect(request("POST", "/v1/videos", PROMPT)[:-1]):
        while not server.server.server_state.tasks:
            server.ask("GET", "/health")
        server.ask_to_stop()
        server.ask_to_stop()
        assert server.ended()
    assert not [record for record in caplog.records if "lifespan" in record.getMessage() + str(record.exc_text)]
    assert not [record for record in caplog.records if record.getMessage().startswith("Traceback")]


@pytest.mark.parametrize("signals", [1, 2])
def test_a_stop_is_answered_at_once_and_a_second_signal_kills_the_worker(make_api: Any, signals: int) -> None:
    worker = SimpleNamespace(calls=[])
    for name in ("start", "kill", "stop"):
        setattr(worker, name, lambda *_, name=name: worker.calls.append(name))
    with listen.listen("127.0.0.1", 0) as listener, capture_logs() as lines:

        def stop(_: str) -> None:
            for _ in range(signals):
                server.handle_exit(signal.SIGINT, None)

        server = listen.Server(make_api().app, stop)
        _run_both(server, listener, worker)
    assert [line["event"] for line in lines] == [listen.STOPPING, listen.STOPPING_AT_ONCE][:signals]
    assert worker.calls == (["start", "stop"] if signals == 1 else ["start", "kill", "stop"])


def finish_large(server: Listening) -> str:
    """A finished video of 8 MiB: more than the system keeps for a client that does not read."""
    server.api.create()
    lease = server.api.claim()
    path: Path = server.api.store.files.work_path(lease.job.id)
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(2**23))
    files: list[OutputFile] = [server.api.store.files.publish(lease.job.id, lease.token, 0, path)]
    return server.api.store.complete(lease, files).id


def is_reset(client: socket.socket, seconds: float) -> bool:
    """Whether the server has ended the connection, without reading what it sent."""
    client.settimeout(seconds)
    try:
        client.sendall(b" ")
    except ConnectionError:
        return True
    except TimeoutError:
        pass
    return False


def wait_for_reset(client: socket.socket) -> None:
    import time

    end = time.monotonic() + WAIT
    while not is_reset(client, 0.1):
        assert time.monotonic() < end, "the connection stays"
        time.sleep(0.02)
