"""What libraries log in the service's processes: JSON lines at a limited rate, without a client's words."""

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from wanduet.config import EngineConfig
from wanduet.jobs.library_logs import RateLimit, configure_library_logs
from wanduet.jobs.worker import WorkerSettings


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler()])  # as the command line does
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
    assert "test_library_logs.py" in lines[0]["where"][-1]
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


def test_numbers_that_a_client_chooses_make_no_new_line(lines: list[Any]) -> None:
    for number in range(1000):
        logging.getLogger("python_multipart").warning("Expected character %d at index %d", number, 2)
    assert [line["event"] for line in lines] == ["Expected character 0 at index 2"]


def test_what_was_kept_back_is_counted() -> None:
    now = [0.0]
    rate = RateLimit(10.0, clock=lambda: now[0])
    assert [rate.admit("a"), rate.admit("a"), rate.admit("b"), rate.admit("a")] == [0, None, 0, None]
    now[0] = 10.0
    assert [rate.admit("a"), rate.admit("a")] == [2, None]
    for number in range(10_000):
        rate.admit(number)
    assert len(rate._last) <= 256


ENGINE = """
import logging, warnings
from wanduet.errors import WanduetError
class Engine:
    def __init__(self, config):
        warnings.warn("divide by zero", RuntimeWarning)
        logging.getLogger("some.library").warning("something of %s", "a secret prompt")
        raise WanduetError("There is no engine.")
"""


def test_a_workers_libraries_write_lines_too(tmp_path: Path) -> None:
    (tmp_path / "warns.py").write_text(ENGINE)
    settings = WorkerSettings(EngineConfig(data_dir=tmp_path / "data"), engine="warns:Engine")
    done = subprocess.run(
        [sys.executable, "-m", "wanduet.jobs.worker", settings.to_json()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in lines][1:] == ["something of %s", "the worker cannot go on"]
    assert "divide by zero" in lines[0]["event"]
    assert "secret" not in done.stderr
