"""Reads uploaded videos in a short-lived subprocess, so that a broken file cannot crash or stall the server.

`python -m wanduet.doors.http.uploads VIDEO` prints the video's provenance, or an error, as JSON.
"""

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from wanduet.doors.http.errors import unavailable
from wanduet.errors import WanduetError
from wanduet.jobs.child import child_environment, module_command
from wanduet.media.files import UnreadableFileError

TIMEOUT_SECONDS = 15.0
MAX_MEMORY_BYTES = 2 * 2**30  # of address space; libraries reserve more than they use
MAX_ANSWER_BYTES = 2**20
START_RETRY_SECONDS = 5
_MODULE = "wanduet.doors.http.uploads"


class MetadataReader:
    """Reads the provenance of untrusted videos. Callers limit how many are read at one time."""

    def __init__(self, timeout_seconds: float = TIMEOUT_SECONDS, module: str = _MODULE) -> None:
        self._timeout = timeout_seconds
        self._command = module_command(module)

    def read(self, video: Path) -> dict[str, Any]:
        """Return a video's provenance.

        Raises WanduetError if it has none or cannot be read, ApiError if no process starts.

        A process that takes longer than `timeout_seconds` is killed.
        """
        status, text = self._run(video)
        if status is None:
            raise UnreadableFileError(f"{video} takes too long to be read.")
        found: Any = None
        if status == 0:
            with suppress(ValueError, RecursionError):
                found = json.loads(text)
        if not isinstance(found, dict) or not isinstance(found.get("about"), dict | None):
            raise UnreadableFileError(f"{video} cannot be read: it is damaged, or no video.")
        if found.get("about") is None:
            raise UnreadableFileError(str(found.get("error")))
        about: dict[str, Any] = found["about"]
        return about

    def _run(self, video: Path) -> tuple[int | None, bytes]:
        """Return the process's exit status (None if it was killed for exceeding the timeout) and its output."""
        # One thread: each thread reserves address space. Proxy variables, tokens and passwords are not passed on.
        environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        environment |= {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "SYSTEMROOT") if name in os.environ}
        environment = child_environment(environment)
        nothing, pipe = subprocess.DEVNULL, subprocess.PIPE  # a pipe also works where the temporary folder is full
        try:
            process = subprocess.Popen(
                [*self._command, str(video)], stdin=nothing, stdout=pipe, stderr=nothing, env=environment
            )
        except OSError:  # no memory for a process, or no file descriptors for its pipe
            why = "No process can be started to read the file just now."
            raise unavailable("overloaded", why, START_RETRY_SECONDS) from None
        too_late = threading.Event()

        def end() -> None:
            too_late.set()
            process.kill()

        timer = threading.Timer(self._timeout, end)
        timer.start()
        with process:
            assert process.stdout is not None
            text = process.stdout.read(MAX_ANSWER_BYTES + 1)
            if len(text) > MAX_ANSWER_BYTES:
                process.kill()
            status = process.wait()
            timer.cancel()
        return (None if too_late.is_set() else status), text


def _limit_this_process() -> None:
    if sys.platform == "win32":
        return
    import resource

    os.nice(10)  # lower priority than the server and its worker
    limits = {
        resource.RLIMIT_AS: MAX_MEMORY_BYTES,
        resource.RLIMIT_CPU: int(TIMEOUT_SECONDS),
        resource.RLIMIT_FSIZE: MAX_ANSWER_BYTES,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        with suppress(OSError, ValueError):  # macOS does not support this limit
            resource.setrlimit(limit, (value, value))


def main() -> None:
    """Run the short-lived process."""
    _limit_this_process()
    from wanduet.media.read import read_metadata

    try:
        answer: dict[str, Any] = {"about": read_metadata(Path(sys.argv[1]))}
    except WanduetError as error:
        answer = {"about": None, "error": error.message}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
