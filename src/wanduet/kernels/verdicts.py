"""Records which fused kernels do not work on this machine: in this process, and in a file from earlier ones.

Plans use these verdicts, so that they count with the kernels that will run. A verdict is valid as long as the driver
and the installed packages are the same; one of a failure, for a day at most.
"""

import importlib.util
import json
import logging
import os
import shutil
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch

from wanduet.errors import KernelFailedError
from wanduet.folders import replace_json
from wanduet.kernels.measurements import FAILURE_S, machine_state

log = logging.getLogger(__name__)
Result = TypeVar("Result")

VERDICTS_FILE = "kernels.json"
IN_A_JOB = "failed in a job"  # used in place of a set's name, for operations of any set
MEMORY_SHORT = "too little memory was free at that moment"
_LOCK = threading.Lock()
_PLAIN: dict[str, tuple[str, ...]] = {}  # by `_key`: operations whose plain form runs; empty if all kernels work


def triton_problem() -> str | None:
    """Return why Triton cannot compile here, as far as can be seen without running it; None if nothing is missing.

    Triton compiles a small C module at first use and caches it; so callers skip this check once a kernel has worked.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if sys.platform == "win32":
        return None  # triton-windows brings a compiler
    if not os.environ.get("CC") and not any(shutil.which(name) for name in ("gcc", "clang")):
        return "Triton finds no C compiler"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's header files are not installed, which Triton compiles with"
    return None


def plain_operations(what: str, device: torch.device) -> tuple[str, ...] | None:
    """Return the operations of a set (`what`) that do not work on a GPU in some dtype; None if there is no verdict."""
    with _LOCK:
        found = [plain for key, plain in _PLAIN.items() if key.startswith(_key(what, device, ""))]
    return tuple(sorted({name for plain in found for name in plain})) if found else None


def remember(what: str, device: torch.device, dtype: torch.dtype, plain: Iterable[str]) -> None:
    """Record the check of a set of kernels (`what`): `plain` are the operations that do not work."""
    with _LOCK:
        _PLAIN[_key(what, device, str(dtype))] = tuple(plain)


def remember_failure(operation: str, device: torch.device) -> None:
    """Record that an operation's kernel failed in a job after its check had passed, so that it is not tried again."""
    with _LOCK:
        key = _key(IN_A_JOB, device, "")
        _PLAIN[key] = tuple(sorted({*_PLAIN.get(key, ()), operation}))


def read_verdicts(folder: Path) -> None:
    """Read the valid verdicts of earlier processes; a damaged file is ignored."""
    try:
        rows = json.loads((folder / VERDICTS_FILE).read_text())
        now = time.time()
        for key, row in rows.items():
            lasts = not row["plain"] or 0 <= now - row["since"] < FAILURE_S
            if row["state"] == machine_state() and lasts:
                with _LOCK:
                    _PLAIN.setdefault(key, tuple(str(name) for name in row["plain"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return


def write_verdicts(folder: Path) -> None:
    """Write the verdicts for later processes. If the disk fails, logs a warning, and the next process checks again."""
    with _LOCK:
        known = dict(_PLAIN)
    rows = {key: {"plain": plain, "state": machine_state(), "since": time.time()} for key, plain in known.items()}
    try:
        replace_json(folder / VERDICTS_FILE, rows)
    except OSError as problem:
        log.warning("What is known of kernels cannot be kept in %s: %s", folder, problem)


def guard(operation: str, run: Callable[..., Result]) -> Callable[..., Result]:
    """Return `run`, which raises KernelFailedError with the operation's name if compiling or launching fails."""

    def call(*args: Any, **options: Any) -> Result:
        try:
            return run(*args, **options)
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:  # a compiler can raise any exception
            log.info("%s failed.", operation, exc_info=failure)
            reason = reason_of(failure)
        raise KernelFailedError(operation, reason)  # outside the handler, whose traceback keeps tensors alive

    return call


def forget() -> None:
    """Delete all verdicts of this process, for tests."""
    with _LOCK:
        _PLAIN.clear()


def _key(what: str, device: torch.device, dtype: str) -> str:
    """Return the key of a verdict. GPUs of one model share verdicts; an absent GPU has none."""
    name = str(device)
    if device.type == "cuda" and (device.index or 0) < torch.cuda.device_count():
        name = torch.cuda.get_device_name(device)
    return f"{what}|{name}|{dtype}"


def reason_of(problem: Exception, most: int = 160) -> str:
    """Return a library's failure in one readable line: the exception's type and the first line of its message."""
    if isinstance(problem, torch.OutOfMemoryError):
        return MEMORY_SHORT
    first = (str(problem).strip().splitlines() or [""])[0].strip()
    text = f"{type(problem).__name__}: {first}" if first else type(problem).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."
