"""Cancelling a denoise within a step, which may take minutes."""

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

from wanduet.errors import CancelledError
from wanduet.runtime.context import RunContext

LONG_STEP = 5.0  # seconds
QUEUED_BLOCKS = 2  # of a long step: enough that the GPU never waits for the host


class Mark(Protocol):
    """A point in a device's queue of work."""

    def synchronize(self) -> None:
        """Wait until the device has reached it."""


class BlockCancel:
    """Called before each block of a forward. Raises CancelledError if the job is cancelled.

    A host launches work faster than a GPU does it, so a cancel would free the GPU only after all that is queued. While
    steps take longer than LONG_STEP, the host therefore launches only QUEUED_BLOCKS blocks ahead.

    Ranks of a group must all stop before the same block: their context's `should_cancel_in_step` sees to that.
    """

    def __init__(self, context: RunContext, mark: Callable[[], Mark] | None = None) -> None:
        """`mark` puts a Mark into the queue of the device; None for a device without one."""
        self._should_cancel, self._mark = context.should_cancel_in_step or context.should_cancel, mark
        self._marks: deque[Mark] = deque()
        self._began = time.perf_counter()
        self._is_long = False
        self.within_step = False  # whether a step was cancelled before its end

    def __call__(self) -> None:
        """See the class."""
        if self._should_cancel():
            self.within_step = True
            raise CancelledError("The job was cancelled.")
        if self._is_long and self._mark is not None:
            self._marks.append(self._mark())
            if len(self._marks) > QUEUED_BLOCKS:
                self._marks.popleft().synchronize()

    def step_ended(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Measure a step."""
        now = clock()
        self._is_long, self._began = now - self._began > LONG_STEP, now


def mark_on(device: torch.device) -> Callable[[], Mark] | None:
    """Return the `mark` of a BlockCancel for a device."""
    if device.type != "cuda":
        return None

    def mark() -> Mark:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return event

    return mark
