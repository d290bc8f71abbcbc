"""Processes that begin where imports end: forked from one that has imported the engine, which takes seconds otherwise.

For tests of what processes do, not of how they start.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, get_context
from multiprocessing.context import BaseContext

import pytest

# What a process of a generation imports as it starts, and what it imports later.
MODULES = (
    "wanduet.engine.ranks",
    "diffusers.schedulers.scheduling_unipc_multistep",
    "transformers.models.umt5.modeling_umt5",
)


def start_method() -> BaseContext:
    """A context of `multiprocessing`; where fork is not safe, one whose processes start anew."""
    if sys.platform != "linux":
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(list(MODULES))
    forkserver.ensure_running()
    return context


@contextmanager
def forked_ranks() -> Iterator[None]:
    """The ranks of groups that are started inside this are forked."""
    context = start_method()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wanduet.distributed.launch.get_context", lambda method: context)
        yield


def end_server() -> None:
    """End the process that others are forked from: its own end would print what Triton's compiler leaks."""
    if (pid := getattr(forkserver._forkserver, "_forkserver_pid", None)) is not None:
        os.kill(pid, signal.SIGKILL)
