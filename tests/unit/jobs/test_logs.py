"""What of an error reaches the service's log: places and types, as JSON, and never what a prompt could be in."""

import json
import subprocess
import sys

CODE = """
import logging, threading
from wanduet.jobs.logs import configure_logs
configure_logs()
def fail():
    raise ValueError("a secret prompt")
try:
    fail()
except ValueError:
    logging.getLogger("wanduet.engine").exception("a stage failed")
thread = threading.Thread(target=fail, name="nobody-watches")
thread.start()
thread.join()
"""


def test_errors_of_the_engine_and_of_threads_are_lines_with_places_and_no_messages() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    engine, thread = (json.loads(line) for line in done.stderr.splitlines())
    assert (engine["event"], engine["error"], engine["logger"]) == ("a stage failed", "ValueError", "wanduet.engine")
    assert (thread["event"], thread["error"], thread["thread"]) == ("a thread died", "ValueError", "nobody-watches")
    for line in (engine, thread):
        assert line["where"][-1].endswith(" fail")
    assert "secret" not in done.stderr


TWICE = """
import contextlib, io, structlog
from wanduet.jobs.logs import configure_logs
log = structlog.get_logger()
for stream in (io.StringIO(), io.StringIO()):
    with contextlib.redirect_stderr(stream):
        configure_logs()
    log.info("a line")
    assert stream.getvalue().count("a line") == 1
with structlog.testing.capture_logs() as lines:
    log.info("captured")
assert [line["event"] for line in lines] == ["captured"]
assert "captured" not in stream.getvalue()
"""


def test_a_logger_that_has_written_follows_what_is_set_up_later() -> None:
    subprocess.run([sys.executable, "-c", TWICE], check=True)
