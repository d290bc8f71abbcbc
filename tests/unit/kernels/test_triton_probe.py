"""What is said of a Triton that does not work. A package of this name stands in for it in the probe's process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wanduet.kernels import triton_probe
from wanduet.kernels.triton_probe import Probe, probe_triton

# Of gcc and of Triton 3.9, as they were seen.
NO_HEADER = "/tmp/x/cuda_utils.c:9:10: fatal error: Python.h: No such file or directory"
NO_COMPILER = "Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl."
NO_DRIVER = "libcuda.so cannot found!\\nPlease make sure GPU is set up"
NO_LIBRARY = "/usr/bin/ld: cannot find -l:libcuda.so.1: No such file or directory"


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Write a package whose driver runs some code when its `utils` are asked for."""
    monkeypatch.setattr(triton_probe, "has_triton", lambda: True)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))

    def write(code: str, cache: Path = tmp_path / "cache") -> None:
        package = tmp_path / "packages" / "triton"
        (package / "runtime").mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "knobs.py").write_text(f"class cache:\n    dir = {str(cache)!r}\n")
        (package / "runtime" / "__init__.py").touch()
        body = "".join(f"        {line}\n" for line in code.splitlines())
        driver = f"import os, subprocess, sys, time\nclass Driver:\n    @property\n    def utils(self):\n{body}active = Driver()\n"
        (package / "runtime" / "driver.py").write_text(driver)

    return write


def test_one_that_works_has_no_problem(triton) -> None:
    triton("sys.stderr.write('a warning')")
    assert probe_triton() == Probe(tried=True)


@pytest.mark.parametrize(
    ("code", "problem", "hint"),
    [
        (f"raise RuntimeError({NO_COMPILER!r})", "no C compiler", "gcc"),
        (f"sys.stderr.write({NO_HEADER!r}); raise subprocess.CalledProcessError(1, ['gcc'])", "header", "python3-dev"),
        (f"raise AssertionError({NO_DRIVER!r})", "libcuda", "ldconfig"),
        (f"sys.stderr.write({NO_LIBRARY!r}); raise subprocess.CalledProcessError(1, ['gcc'])", "libcuda", "ldconfig"),
        (
            "sys.stderr.write('a.c:1: error: no c.h\\n'); raise subprocess.CalledProcessError(1, ['gcc'])",
            "error: no c.h",
            "",
        ),
        ("raise ValueError('something\\x1b[2J else')", "(ValueError: something\N{REPLACEMENT CHARACTER}[2J else)", ""),
        ("os._exit(7)", "its process ended with 7", ""),
    ],
)
def test_what_fails_is_named_in_one_sentence(triton, code: str, problem: str, hint: str) -> None:
    triton(code)
    found = probe_triton()
    assert found.tried
    assert found.problem is not None
    assert problem in found.problem
    assert "\n" not in found.problem
    assert (hint in found.hint) if hint else not found.hint


def test_a_cache_folder_that_cannot_be_written_is_named(triton, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    triton("pass", cache=tmp_path / "file" / "cache")
    found = probe_triton()
    assert str(tmp_path / "file" / "cache") in (found.problem or "")
    assert "TRITON_CACHE_DIR" in found.hint


@pytest.mark.skipif(sys.platform == "win32", reason="its processes have no groups")
def test_a_compiler_that_hangs_is_ended(triton, tmp_path: Path, monkeypatch) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    compiler = f"import time; kept = open({str(pipe)!r}, 'w'); time.sleep(600)"
    triton(f"subprocess.run([sys.executable, '-c', {compiler!r}])")
    kept_open = []

    class HasTimedOut(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is None:
                return super().wait()
            kept_open.append(pipe.open("rb"))  # when the compiler has opened it, too
            raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(triton_probe.subprocess, "Popen", HasTimedOut)
    assert probe_triton(limit_s=9).problem == "Triton was not ready after 9 s"
    with kept_open[0] as file:
        assert file.read() == b""  # the end, which comes when nobody has it open for writing


def test_nothing_is_tried_without_triton(monkeypatch) -> None:
    monkeypatch.setattr(triton_probe, "has_triton", lambda: False)
    assert probe_triton() == Probe(False, "Triton is not installed")
