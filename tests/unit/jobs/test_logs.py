"""What of an error reaches the service's log: places and types, as JSON, and never what a prompt could be in."""

import json
import re
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


TERMINAL = """
import contextlib, io, structlog
from wanduet.jobs.logs import configure_logs
class Terminal(io.StringIO):
    def isatty(self):
        return True
with contextlib.redirect_stderr(Terminal()) as stream:
    configure_logs()
structlog.get_logger().warning("the worker hangs", job="video_1\\n\\x1b[2J", seconds=3)
print(stream.getvalue(), end="")
"""


def test_on_a_terminal_a_line_is_for_people_and_cannot_control_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TERMINAL], capture_output=True, text=True, encoding="utf-8", check=True
    )
    assert re.fullmatch(r"\d\d:\d\d:\d\d warning: the worker hangs \(job=video_1 \S+, seconds=3\)\n", done.stdout)
    assert "\x1b" not in done.stdout
