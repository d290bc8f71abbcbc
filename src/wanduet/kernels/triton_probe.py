"""Tests in a separate process whether Triton works on this machine: whether it builds or loads its driver module.

Triton compiles this module from C at first use, which needs more than `verdicts.triton_problem` can check. A failure
there can terminate the process.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from wanduet.kernels.select import has_triton
from wanduet.untrusted import cut, printable

LIMIT_S = 120.0  # for importing Triton from a slow disk, and for a compiler that takes a few seconds

# The cache folder is tested first, because Triton's errors do not name it.
PROGRAM = """
import os, sys, tempfile
from triton import knobs
folder = knobs.cache.dir
try:
    os.makedirs(folder, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
except OSError as error:
    sys.exit(f"cache folder {folder}: {error.strerror}")
from triton.runtime import driver
driver.active.utils
"""


@dataclass(frozen=True, slots=True)
class Probe:
    """Result of the test. `tried`: False if nothing was run.

    `problem`: a sentence without its full stop; None if Triton works, or if there is no GPU. `hint`: a remedy, in
    sentences; may be empty.
    """

    tried: bool
    problem: str | None = None
    hint: str = ""


# Known problems: a pattern in the process's output, the problem, and a hint.
KNOWN = (
    (
        r"cache folder (.*)$",
        "Triton cannot write to its cache folder {0}",
        "Set TRITON_CACHE_DIR to a folder that can be written.",
    ),
    (
        r"Failed to find C compiler|No such file or directory: '[^']*(?:cc|clang)[^']*'",
        "Triton finds no C compiler",
        "Install one (Debian: apt install gcc).",
    ),
    (
        r"Python\.h",
        "Python's header files are not installed, which Triton compiles with",
        "Install them (Debian: apt install python3-dev).",
    ),
    (
        r"libcuda\.so cannot found|cannot find -l:?(?:lib)?cuda|libcuda\.so[.\d]*: cannot open",
        "Triton does not find libcuda, which comes with the NVIDIA driver",
        "Run ldconfig as root, or set TRITON_LIBCUDA_PATH to the folder that libcuda.so.1 is in.",
    ),
)


def probe_triton(limit_s: float = LIMIT_S) -> Probe:
    """Let Triton build its driver module in a process, which is ended with its compiler after `limit_s`.

    Needs a GPU.
    """
    if not has_triton():
        return Probe(False, "Triton is not installed")
    with tempfile.TemporaryFile(
        "w+", encoding="utf-8", errors="replace"
    ) as output:  # not a pipe, which a hanging compiler would keep open
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=output,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return Probe(True, f"Triton was not ready after {limit_s:.0f} s")
        finally:
            _end(process)
        output.seek(0)
        return Probe(True) if code == 0 else _explained(output.read(), code)


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _explained(output: str, code: int) -> Probe:
    for pattern, problem, hint in KNOWN:
        if found := re.search(pattern, output, re.MULTILINE):
            return Probe(True, printable(cut(problem.format(*found.groups()))), hint)
    lines = output.strip().splitlines() or [f"its process ended with {code}"]
    worst = next((line for line in lines if "error: " in line), lines[-1])  # a compiler's error, or the last line
    return Probe(True, f"Triton does not work here ({printable(cut(worst))})")
