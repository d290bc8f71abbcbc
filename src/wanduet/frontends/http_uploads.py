"""Videos that people send are read in a short-lived process of their own: a file that breaks the parser, or keeps it
busy, costs that process and not the server.

    python -m wanduet.frontends.http_uploads VIDEO    prints what made it, or why that cannot be said, as JSON
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from wanduet.errors import WanduetError
from wanduet.jobs.child import child_environment, module_command
from wanduet.media.files import UnreadableFileError

TIMEOUT_SECONDS = 30.0
MAX_MEMORY_BYTES = 2 * 2**30  # of addresses; libraries reserve more than they use
MAX_ANSWER_BYTES = 2**20
AT_ONCE = 2
_MODULE = "wanduet.frontends.http_uploads"


class MetadataReader:
    """Reads the provenance of videos that are not trusted; of two at the same moment at most, others wait."""

    def __init__(self, timeout_seconds: float = TIMEOUT_SECONDS, module: str = _MODULE) -> None:
        self._timeout = timeout_seconds
        self._command = module_command(module)
        self._turn = threading.BoundedSemaphore(AT_ONCE)

    def read(self, video: Path) -> dict[str, Any]:
        """What made the video. Raises WanduetError if it does not say, or cannot be read."""
        # One thread: each would reserve addresses of its own. No proxy variables, tokens or passwords go along.
        environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        environment |= {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "SYSTEMROOT") if name in os.environ}
        environment = child_environment(environment)
        with self._turn, tempfile.TemporaryFile() as answer:
            try:
                done = subprocess.run(
                    [*self._command, str(video)],
                    stdin=subprocess.DEVNULL,
                    stdout=answer,
                    stderr=subprocess.DEVNULL,
                    env=environment,
                    timeout=self._timeout,
                    check=False,
                )
            except subprocess.TimeoutExpired:  # it was killed
                raise UnreadableFileError(f"{video} takes too long to be read.") from None
            answer.seek(0)
            text = answer.read(MAX_ANSWER_BYTES)
        found: Any = None
        if done.returncode == 0:
            with suppress(ValueError, RecursionError):
                found = json.loads(text)
        if not isinstance(found, dict) or not isinstance(found.get("about"), dict | None):
            raise UnreadableFileError(f"{video} cannot be read: it is damaged, or no video.")
        if found.get("about") is None:
            raise UnreadableFileError(str(found.get("error")))
        about: dict[str, Any] = found["about"]
        return about


def _limit_this_process() -> None:
    if sys.platform == "win32":
        return
    import resource

    limits = {
        resource.RLIMIT_AS: MAX_MEMORY_BYTES,
        resource.RLIMIT_CPU: int(TIMEOUT_SECONDS),
        resource.RLIMIT_FSIZE: MAX_ANSWER_BYTES,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        with suppress(OSError, ValueError):  # macOS knows no limit of addresses
            resource.setrlimit(limit, (value, value))


def main() -> None:
    """The entry point of the short-lived process."""
    _limit_this_process()
    from wanduet.media.read import read_metadata

    try:
        answer: dict[str, Any] = {"about": read_metadata(Path(sys.argv[1]))}
    except WanduetError as error:
        answer = {"about": None, "error": error.message}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
