"""The download of a model that a server waits for: in a process of its own, which can be ended and started again."""

import json
import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import structlog

from wanduet.config import EngineConfig
from wanduet.doors.http.public import public_text
from wanduet.jobs.child import child_environment, module_command
from wanduet.weights.names import SUFFIX
from wanduet.weights.published import published_models

RETRY_SECONDS = 60.0

log = structlog.get_logger(__name__)


class Fetch:
    """Downloads a model with `wanduet download`. Files that came whole, and parts of files, stay when it is stopped.

    `on_done` is called from another thread once the model is on this machine. `command` stands in for the download in tests.
    """

    restarts = hangs = 0  # it is shown in place of a worker

    def __init__(self, config: EngineConfig, on_done: Callable[[], None], command: Sequence[str] | None = None) -> None:
        self._model, self._on_done = config.model, on_done
        self._command = list(command or _download_command(config))
        known = published_models().get(config.model)
        self._total = None if known is None else known.num_bytes
        self._guard = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._wake = threading.Event()  # ends a pause between two attempts
        self._wanted = False
        self._error: str | None = None
        self._done = False

    @property
    def trouble(self) -> str:
        """Why no video can be made."""
        state = ": it is being fetched." if self._wanted else "."
        return f"{self._model} is not on this machine yet{state} {self._error or ''}".rstrip()

    def start(self, retry: bool = False) -> None:
        """Begin or resume the download, if it does not run. `retry`: begin again a minute after each failure."""
        with self._guard:
            self._wake.set()
            if self._wanted or self._done:
                return
            self._wanted, self._error, self._wake = True, None, threading.Event()
            threading.Thread(target=self._run, args=(retry, self._wake), name="fetch", daemon=True).start()

    def stop(self) -> None:
        """Stop the download; return when its process has ended."""
        with self._guard:
            self._wanted = False
            self._wake.set()
            process = self._process
        if process is not None:
            process.kill()  # nothing is lost: the hub's client goes on with half a file
            process.wait()

    def state(self) -> dict[str, Any]:
        """Return the model with its short name, the bytes that are here and in all (None: not known), and whether it runs or why not."""
        here = _bytes_here(self._model)
        return {
            "model": self._model,
            "name": self._model.rpartition("/")[2].removesuffix(SUFFIX),
            "bytes": here if self._total is None else min(here, self._total),
            "total": self._total,
            "running": self._wanted,
            "done": self._done,
            "error": self._error,
        }

    def _run(self, retry: bool, wake: threading.Event) -> None:
        while True:
            error = self._attempt(wake)
            with self._guard:
                if wake.is_set() and error is not None:
                    return
                self._error, self._done = error, error is None
                self._wanted = retry and error is not None
            if error is not None:
                log.warning("the model was not fetched", error=error)
            if error is None:
                self._on_done()
            if not self._wanted or wake.wait(RETRY_SECONDS):
                return

    def _attempt(self, wake: threading.Event) -> str | None:
        """Run the download once; return why it failed, None if it did not."""
        environment = child_environment(os.environ)
        with self._guard:
            if wake.is_set():
                return "stopped"
            process = subprocess.Popen(
                self._command,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                env=environment,
            )
            self._process = process
        printed, _ = process.communicate()
        with self._guard:
            if self._process is process:  # it may have been stopped, and another begun
                self._process = None
        return None if process.returncode == 0 else _message(printed)


def _download_command(config: EngineConfig) -> list[str]:
    revision = ("--revision", config.revision) if config.revision else ()
    folder = str(config.data_folder)
    flags = ("--model", config.model, *revision, "--data-dir", folder, "--json")
    return module_command("wanduet.doors.cli.main", "download", *flags)


def _message(printed: str) -> str:
    """Return the message of the command's error, without its hint, which names flags."""
    try:
        return public_text(str(json.loads(printed)["error"]["message"]).partition("\n")[0])
    except (ValueError, LookupError, TypeError):
        return "The download ended before it was done."


def _bytes_here(model: str) -> int:
    """Return the bytes of a model in the hub's cache, with those of files that are not whole."""
    from huggingface_hub import constants

    total = 0
    for path in (Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}").rglob("*"):
        try:
            if not path.is_symlink() and path.is_file():
                total += path.stat().st_size
        except OSError:  # a file that has just been renamed
            continue
    return total
