"""Processes that begin where imports end: forked from one that has imported the engine, which takes seconds otherwise.

For tests of what processes do, not of how they start.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch

# What a process of a generation imports as it starts, and what it imports later.
MODULES = (
    "wanduet.doors.cli.commands",
    "wanduet.doors.cli.main",
    "wanduet.engine.ranks",
    "wanduet.jobs.worker",
    "diffusers.schedulers.scheduling_unipc_multistep",
    "transformers.models.umt5.modeling_umt5",
)


def start_method() -> BaseContext:
    """A context of `multiprocessing`; where fork is not safe, one whose processes start anew."""
    if (
        sys.platform != "linux" or torch.cuda.is_available()
    ):  # no process can use a GPU that was forked from one that did
        return get_context("spawn")
    from multiprocessing import forkserver

    context = get_context("forkserver")
    context.set_forkserver_preload(list(MODULES))
    with pytest.MonkeyPatch.context() as patch:
        # Of tests of interpreted kernels that ran before: whatever is imported there would interpret, too.
        patch.delenv("TRITON_INTERPRET", raising=False)
        forkserver.ensure_running()
    return context


@contextmanager
def forked_ranks() -> Iterator[None]:
    """The ranks of groups that are started inside this are forked."""
    context = start_method()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wanduet.distributed.launch.get_context", lambda method: context)
        yield


def start_program(
    code: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str], *, forked: bool = True
) -> "Program":
    """Start a Python program, with pipes of text, in a session of its own.

    `forked`: after the imports, where fork is safe. Otherwise with an interpreter of its own, from its start to its end.
    """
    if forked and sys.platform == "linux":
        return Forked(code, arguments, folder, environment)
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


class Forked:
    """What `subprocess.Popen` would be of a program."""

    def __init__(self, code: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        context: Any = start_method()
        (stdin, own_in), (own_out, stdout), (own_err, stderr) = (context.Pipe(duplex=False) for _ in range(3))
        what = (code, tuple(arguments), str(folder), dict(environment))
        self._process = context.Process(target=_run, args=(*what, stdin, stdout, stderr), daemon=True)
        self._process.start()
        self.pid: int = self._process.pid
        self.stdin, self.stdout, self.stderr = _text(own_in, "w"), _text(own_out, "r"), _text(own_err, "r")
        for end in (stdin, stdout, stderr):
            end.close()

    @property
    def returncode(self) -> int | None:
        """As of `Popen`."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Nothing if it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Close its input, and return what it prints until it ends; one that takes longer is killed."""
        self.stdin.close()
        with self.stdout, self.stderr, ThreadPoolExecutor(2) as pool:
            printed = pool.submit(self.stdout.read), pool.submit(self.stderr.read)
            self._process.join(timeout)
            if self._process.is_alive():
                self._process.kill()
                raise TimeoutError(f"It did not end within {timeout} s.")
            return printed[0].result(), printed[1].result()


Program = subprocess.Popen[str] | Forked


def _text(end: "Connection[Any, Any]", mode: str) -> TextIO:
    with end:
        return open(os.dup(end.fileno()), mode)


def _run(
    code: str, arguments: tuple[str, ...], folder: str, environment: dict[str, str], *pipes: "Connection[Any, Any]"
) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, pipe in enumerate(pipes):
        with pipe:
            os.dup2(pipe.fileno(), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def end_server() -> None:
    """End the process that others are forked from: its own end would print what Triton's compiler leaks."""
    forkserver = sys.modules.get("multiprocessing.forkserver")
    if forkserver is not None and (pid := forkserver._forkserver._forkserver_pid) is not None:
        os.kill(pid, signal.SIGKILL)
