"""How far the host launches ahead of a device while steps are long."""

import pytest

from wanduet.errors import CancelledError
from wanduet.runtime.context import RunContext
from wanduet.stages.cancel import LONG_STEP, QUEUED_BLOCKS, BlockCancel


class Device:
    """Counts the marks in its queue, and those that it was waited for."""

    def __init__(self) -> None:
        self.marks = self.waits = 0

    def mark(self) -> "Device":
        self.marks += 1
        return self

    def synchronize(self) -> None:
        self.waits += 1


def test_only_in_long_steps_the_host_waits_for_the_device() -> None:
    device, now = Device(), [0.0]
    cancel = BlockCancel(RunContext(), device.mark)
    cancel.step_ended(lambda: now[0])
    for seconds, marked in ((LONG_STEP / 2, False), (2 * LONG_STEP, True)):
        now[0] += seconds
        cancel.step_ended(lambda: now[0])
        for _ in range(10):
            cancel()
        assert (device.marks, device.waits) == ((10, 10 - QUEUED_BLOCKS) if marked else (0, 0))


def test_a_cancel_raises_and_says_that_a_step_was_begun() -> None:
    cancelled = [False]
    cancel = BlockCancel(RunContext(should_cancel=lambda: cancelled[0]))
    cancel()
    assert not cancel.within_step
    cancelled[0] = True
    with pytest.raises(CancelledError):
        cancel()
    assert cancel.within_step
