"""Reads uploaded videos in a short-lived subprocess, so that a broken file cannot crash or stall the server.

`python -m wanduet.doors.http.uploads VIDEO about` prints the video's provenance, or an error, as JSON; with `source`
instead of `about`, it prints what a request that starts from the video needs to know of it.
"""

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Any

from wanduet.doors.http.errors import unavailable
from wanduet.errors import InvalidRequestError, WanduetError
from wanduet.jobs.child import child_environment, module_command
from wanduet.media.files import UnreadableFileError
from wanduet.source_video import SourceVideo

TIMEOUT_SECONDS = {"about": 15.0, "source": 60.0}
MAX_MEMORY_BYTES = 2 * 2**30  # of address space; libraries reserve more than they use
MAX_ANSWER_BYTES = 2**20
START_RETRY_SECONDS = 5
_MODULE = "wanduet.doors.http.uploads"


class _Reader:
    """Reads untrusted videos. Callers limit how many are read at one time.

    A process that takes longer than `timeout_seconds` is killed.
    """

    question = ""

    def __init__(self, timeout_seconds: float | None = None, module: str = _MODULE) -> None:
        self._timeout = TIMEOUT_SECONDS[self.question] if timeout_seconds is None else timeout_seconds
        self._command = module_command(module)

    def _query(self, video: Path) -> dict[str, Any]:
        """Return the process's answer: the `question`'s, or None and an `error`.

        Raises UnreadableFileError if there is no such answer, ApiError if no process starts.
        """
        status, text = self._run(video)
        if status is None:
            raise UnreadableFileError(f"{video} takes too long to be read.")
        answer: Any = None
        if status == 0:
            with suppress(ValueError, RecursionError):
                answer = json.loads(text)
        if not isinstance(answer, dict) or not isinstance(answer.get(self.question), dict | None):
            raise UnreadableFileError(f"{video} cannot be read: it is damaged, or no video.")
        return answer

    def _run(self, video: Path) -> tuple[int | None, bytes]:
        """Return the process's exit status (None if it was killed for exceeding the timeout) and its output."""
        # One thread: each thread reserves address space. Proxy variables, tokens and passwords are not passed on.
        environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        environment |= {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "SYSTEMROOT") if name in os.environ}
        environment = child_environment(environment)
        nothing, pipe = subprocess.DEVNULL, subprocess.PIPE  # a pipe also works where the temporary folder is full
        try:
            process = subprocess.Popen(
                [*self._command, str(video), self.question], stdin=nothing, stdout=pipe, stderr=nothing, env=environment
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


class MetadataReader(_Reader):
    """Reads the provenance of untrusted videos."""

    question = "about"

    def read(self, video: Path) -> dict[str, Any]:
        """Return a video's provenance.

        Raises WanduetError if it has none or cannot be read, ApiError if no process starts.
        """
        answer = self._query(video)
        if answer.get("about") is None:
            raise UnreadableFileError(str(answer.get("error")))
        about: dict[str, Any] = answer["about"]
        return about


class SourceReader(_Reader):
    """Reads what a request that starts from a video needs to know of it."""

    question = "source"

    def read(self, video: Path, field: str, filename: str) -> SourceVideo:
        """Return the size, length and hash of a video, a client's `filename`.

        Raises InvalidRequestError of the request's `field`, ApiError if no process starts.
        """
        try:
            answer = self._query(video)
        except UnreadableFileError:
            raise InvalidRequestError(field, filename, "it is damaged, too long, or no video") from None
        if answer.get("source") is None:
            raise InvalidRequestError(field, filename, str(answer.get("error")).replace(str(video), "this file"))
        try:
            return _parse_source(answer["source"])
        except (TypeError, ValueError):
            raise InvalidRequestError(field, filename, "it is damaged") from None


def _parse_source(values: dict[str, Any]) -> SourceVideo:
    """Check an answer's values: a process that reads an untrusted file is not trusted. Raises TypeError, ValueError."""
    source = SourceVideo(**values)
    if not (0 < source.height < inf and 0 < source.width < inf and 0 <= source.seconds < inf):
        raise ValueError("impossible values")
    return source


def _limit_this_process(seconds: float) -> None:
    if sys.platform == "win32":
        return
    import resource

    os.nice(10)  # lower priority than the server and its worker
    limits = {
        resource.RLIMIT_AS: MAX_MEMORY_BYTES,
        resource.RLIMIT_CPU: int(seconds),
        resource.RLIMIT_FSIZE: MAX_ANSWER_BYTES,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        with suppress(OSError, ValueError):  # macOS does not support this limit
            resource.setrlimit(limit, (value, value))


def main() -> None:
    """Run the short-lived process."""
    video, question = Path(sys.argv[1]), sys.argv[2]
    _limit_this_process(TIMEOUT_SECONDS[question])
    try:
        answer: dict[str, Any] = {question: _about(video) if question == "about" else _source(video)}
    except InvalidRequestError as error:
        answer = {question: None, "error": error.allowed}
    except WanduetError as error:
        answer = {question: None, "error": error.message}
    print(json.dumps(answer))


def _about(video: Path) -> dict[str, Any]:
    from wanduet.media.read import read_metadata

    return read_metadata(video)


def _source(video: Path) -> dict[str, Any]:
    from wanduet.media.input_video import read_source

    return asdict(read_source(video))


if __name__ == "__main__":
    main()
