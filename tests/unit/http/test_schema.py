"""The OpenAPI schema against the server, by schemathesis (`pip install schemathesis`): no 5xx, no undocumented answer."""

import re
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from typing import Any

import pytest
import uvicorn

from wanduet.doors.http.context import ServerSettings
from wanduet.jobs.records import Limits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("schemathesis") is None, reason="needs schemathesis"),
]
CHECKS = "not_a_server_error,response_schema_conformance,status_code_conformance,content_type_conformance"


def test_no_generated_request_breaks_the_server(make_api: Any, record_property: Any) -> None:
    api = make_api(ServerSettings(queue=Limits(10**6, 10**6)))
    server = uvicorn.Server(uvicorn.Config(api.app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{port}/openapi.json", "--seed", "1",
        "--checks", CHECKS, "--max-examples", "40", "--exclude-path", "/v1/videos/{video_id}/events",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    server.should_exit = True
    thread.join(10)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    cases = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert cases is not None
    record_property("cases", int(cases[1]))
    assert cases[1] == cases[2]
