"""Whether Triton works on this machine, tried in a process of its own: it builds its driver module, or loads the one it has.

What it builds, in C at its first use, asks for more than can be seen from outside (see `kernel_verdicts.triton_problem`),
and what fails there can end a process.
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

LIMIT_S = 120.0  # of importing Triton from a slow disk, and of a compiler that takes a few seconds

# The cache folder is tried first: Triton names it in no error.
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
    """What was seen. `problem`: a sentence without its full stop; None where Triton works, and where there is no GPU, so that
    nothing was tried. `hint`: what helps, in sentences; may be empty."""

    tried: bool
    problem: str | None = None
    hint: str = ""


# What the process's last words mean, by what is found in them.
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
    """Let Triton build what it needs, in a process that ends, with its compiler, after so many seconds. Needs a GPU."""
    if not has_triton():
        return Probe(False, "Triton is not installed")
    with tempfile.TemporaryFile(
        "w+", encoding="utf-8", errors="replace"
    ) as said:  # no pipe: a compiler that hangs would keep it open
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return Probe(True, f"Triton was not ready after {limit_s:.0f} s")
        finally:
            _end(process)
        said.seek(0)
        return Probe(True) if code == 0 else _explained(said.read(), code)


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _explained(said: str, code: int) -> Probe:
    for pattern, problem, hint in KNOWN:
        if found := re.search(pattern, said, re.MULTILINE):
            return Probe(True, printable(cut(problem.format(*found.groups()))), hint)
    lines = said.strip().splitlines() or [f"its process ended with {code}"]
    worst = next((line for line in lines if "error: " in line), lines[-1])  # a compiler's, or what ended the process
    return Probe(True, f"Triton does not work here ({printable(cut(worst))})")
