"""What libraries log in the server's process: JSON lines at a limited rate, without a client's words."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from wanduet.frontends.http_logs import RateLimit, configure_library_logs


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler()])  # as the command line does
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    with capture_logs() as found:
        configure_library_logs()
        yield found
    logging.captureWarnings(False)


def test_records_are_lines_without_the_clients_words(lines: list[Any]) -> None:
    uvicorn = logging.getLogger("uvicorn.error")
    try:
        raise ValueError("a secret prompt")
    except ValueError as error:
        uvicorn.error("Exception in ASGI application\n", exc_info=error)
    uvicorn.warning("Unexpected %s", "a secret prompt")
    uvicorn.error("Cancel %s running task(s)", 3)
    logging.getLogger("asyncio").error("Exception in callback send('a secret prompt')\nhandle: a secret prompt")
    assert [line["event"] for line in lines] == [
        "Exception in ASGI application",
        "Unexpected %s",
        "Cancel 3 running task(s)",
        "Exception in callback send",
    ]
    assert lines[0]["error"] == "ValueError"
    assert "test_logs.py" in lines[0]["where"][-1]
    assert "secret" not in str(lines)


def test_requests_that_the_server_ended_are_no_errors(lines: list[Any]) -> None:
    logging.getLogger("uvicorn.error").error("Exception in ASGI application", exc_info=asyncio.CancelledError())
    assert lines == []


def test_nothing_is_written_beside_the_lines(lines: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    assert (len(lines), capsys.readouterr().err) == (1, "")


def test_a_thousand_equal_records_are_one_line(lines: list[Any]) -> None:
    for _ in range(1000):
        logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    assert len(lines) == 1


def test_a_thread_that_dies_leaves_a_line(lines: list[Any]) -> None:
    def die() -> None:
        raise RuntimeError("a secret prompt")

    thread = threading.Thread(target=die)
    thread.start()
    thread.join()
    assert [line["error"] for line in lines] == ["RuntimeError"]
    assert "secret" not in str(lines)


def test_what_was_kept_back_is_counted() -> None:
    now = [0.0]
    rate = RateLimit(10.0, clock=lambda: now[0])
    assert [rate.admit("a"), rate.admit("a"), rate.admit("b"), rate.admit("a")] == [0, None, 0, None]
    now[0] = 10.0
    assert [rate.admit("a"), rate.admit("a")] == [2, None]
    for number in range(10_000):
        rate.admit(number)
    assert len(rate._last) <= 256
