"""The download of a model that a server waits for: in a process of its own, which can be ended and started again."""

import json
import math
import os
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from wanduet.config import EngineConfig
from wanduet.doors.http.public import public_text
from wanduet.errors import ConfigError
from wanduet.jobs.child import child_environment, module_command
from wanduet.weights.forms import Form, FormName, form_of, forms_of, size_of
from wanduet.weights.names import SUFFIX
from wanduet.weights.published import published_models

RETRY_SECONDS = 60.0
WORDS: dict[FormName, str] = {
    "full": "32 bits, the files for diffusers",
    "bf16": "32 and 16 bits, Wan's own files",
    "comfy": "16 and 8 bits, ComfyUI's files",
}

log = structlog.get_logger(__name__)


class Fetch:
    """Downloads a form of a model with `wanduet download`. Files that came whole, and parts of files, stay when it is stopped.

    `on_done` is called from another thread once the model is on this machine. `command` stands in for the download in
    tests; the flag of another form than the model's own comes after it.
    """

    restarts = hangs = 0  # it is shown in place of a worker

    def __init__(self, config: EngineConfig, on_done: Callable[[], None], command: Sequence[str] | None = None) -> None:
        self._model, self._on_done = config.model, on_done
        self._command = list(command or _download_command(config))
        own = form_of(config.model, None)
        # A revision is a commit of the model's own repository.
        self._forms = {own.name: own} if config.revision else forms_of(config.model)
        self._own, self._form = own.name, None if len(self._forms) > 1 else own.name
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

    def start(self, form: FormName | None = None, retry: bool = False) -> None:
        """Begin or resume the download, if it does not run. `form`: one of the model's forms; None: its own. `retry`:
        begin again a minute after each failure.

        Raises ConfigError for a form that is not offered.
        """
        if form not in (None, *self._forms):
            raise ConfigError(f"{self._model} cannot be fetched in the form {form!r}.")
        with self._guard:
            self._wake.set()
            if self._wanted or self._done:
                return
            self._form = form or self._own
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
        """Return the model with its short name, its `forms`, the one that is or would be fetched, the bytes of that one
        which are here and in all (None: not known), and whether the download runs or why not."""
        forms = {name: self._form_state(form) for name, form in self._forms.items()}
        form = self._form or self._offered(forms)
        return {
            "model": self._model,
            "name": self._model.rpartition("/")[2].removesuffix(SUFFIX),
            "form": form,
            "forms": list(forms.values()),
            "bytes": forms[form]["bytes"],
            "total": forms[form]["total"],
            "running": self._wanted,
            "done": self._done,
            "error": self._error,
        }

    def _form_state(self, form: Form) -> dict[str, Any]:
        known = published_models().get(form.repository)
        total = size_of(self._model, form.name) if known is None else known.num_bytes
        here = _bytes_here(form)
        return {
            "name": form.name,
            "about": WORDS[form.name],
            "bytes": here if total is None else min(here, total),
            "total": total,
        }

    def _offered(self, forms: Mapping[FormName, dict[str, Any]]) -> FormName:
        """Return the form of which most is here, else the smallest: each one suffices."""
        return min(forms, key=lambda name: (-forms[name]["bytes"], forms[name]["total"] or math.inf))

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
            flags = [] if self._form in (None, self._own) else ["--form", self._form]
            process = subprocess.Popen(
                self._command + flags,
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


def _bytes_here(form: Form) -> int:
    """Return the bytes of a form in the hub's cache, with those of files that are not whole."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{form.repository.replace('/', '--')}"
    sizes: dict[Path, int] = {}  # by the file that a link points to: two snapshots share files
    for path in folder.rglob("*"):
        kind, _, *inside = (*path.relative_to(folder).parts, "")
        if not (path.suffix == ".incomplete" or (kind == "snapshots" and form.has("/".join(inside[:-1])))):
            continue
        try:
            if path.is_file():
                sizes[path.resolve()] = path.stat().st_size
        except OSError:  # a file that has just been renamed
            continue
    return sum(sizes.values())
