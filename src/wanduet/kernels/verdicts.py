"""Which fused kernels do not work on this machine: what was seen of them in this process, and, in a file, in earlier ones.

So a plan counts with the kernels that will run. What is remembered holds for a day, and as long as driver and installed
packages are the same.
"""

import importlib.util
import json
import logging
import os
import shutil
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from wanduet.kernels.measurements import FAILURE_S, machine_state

log = logging.getLogger(__name__)

VERDICTS_FILE = "kernels.json"
IN_A_JOB = "failed in a job"  # in place of a set's name: operations of any set
_LOCK = threading.Lock()
_PLAIN: dict[str, tuple[str, ...]] = {}  # by `_key`: operations whose plain form runs; none where all work


def triton_problem() -> str | None:
    """Why Triton will compile nothing here, as far as can be seen without asking it; None if nothing is missing.

    It builds a small module in C at first use, and keeps it: where a kernel has worked before, this is not asked.
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
    """Those of a set of kernels (`what`) that were seen not to work on a GPU, in any dtype; None if nothing was seen."""
    with _LOCK:
        found = [plain for key, plain in _PLAIN.items() if key.startswith(_key(what, device, ""))]
    return tuple(sorted({name for plain in found for name in plain})) if found else None


def remember(what: str, device: torch.device, dtype: torch.dtype, plain: Iterable[str]) -> None:
    """What was seen of a set of kernels by its check."""
    with _LOCK:
        _PLAIN[_key(what, device, str(dtype))] = tuple(plain)


def remember_failure(operation: str, device: torch.device) -> None:
    """An operation's kernel failed in the middle of a job, though its check had passed: it is not tried again."""
    with _LOCK:
        key = _key(IN_A_JOB, device, "")
        _PLAIN[key] = tuple(sorted({*_PLAIN.get(key, ()), operation}))


def read_verdicts(folder: Path) -> None:
    """Take what an earlier process has seen; a damaged file says nothing."""
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
    """Keep what is known for the next process; a disk that cannot costs it a check."""
    with _LOCK:
        known = dict(_PLAIN)
    rows = {key: {"plain": plain, "state": machine_state(), "since": time.time()} for key, plain in known.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=VERDICTS_FILE, delete=False) as partial:
            json.dump(rows, partial, indent=1)
        os.replace(partial.name, folder / VERDICTS_FILE)
    except OSError as problem:
        log.warning("What is known of kernels cannot be kept in %s: %s", folder, problem)


def forget() -> None:
    """As a new process begins, for tests."""
    with _LOCK:
        _PLAIN.clear()


def _key(what: str, device: torch.device, dtype: str) -> str:
    """A GPU by its name: equal ones share what was seen. One that is planned for need not be here; nothing was seen of it."""
    name = str(device)
    if device.type == "cuda" and (device.index or 0) < torch.cuda.device_count():
        name = torch.cuda.get_device_name(device)
    return f"{what}|{name}|{dtype}"
