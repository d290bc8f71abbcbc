"""How long a thread may keep Python's interpreter, and how long an import, while others wait for it."""

import sys
import threading
from collections.abc import Callable
from contextlib import suppress

SECONDS = 5e-4
POLL_SECONDS = 0.05


class ShortSwitches:
    """Between `begin` and `end`, threads take turns at the interpreter ten times as often as Python has them do.

    Each call into PyTorch gives the interpreter away, and gets it back after another thread's turn. Beside an import or a
    compiler, which give nothing away of themselves, a loading waits five milliseconds at each of some thousand calls.
    Several may have begun; the last to end puts the process's own setting back, unless the program has changed it meanwhile.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun = 0
        self._before = self._ours = 0.0

    def begin(self) -> None:
        """Turns are short from now on."""
        with self._lock:
            if self._begun == 0:
                self._before = sys.getswitchinterval()
                sys.setswitchinterval(min(SECONDS, self._before))
                self._ours = sys.getswitchinterval()
            self._begun += 1

    def end(self) -> None:
        """As before, unless somebody else has begun."""
        with self._lock:
            self._begun -= 1
            if self._begun == 0 and sys.getswitchinterval() == self._ours:
                sys.setswitchinterval(self._before)


SHORT_SWITCHES = ShortSwitches()


def finish_unless(is_unwanted: Callable[[], bool], work: Callable[[], object]) -> bool:
    """Do work that cannot be stopped, such as an import of seconds, in a thread of its own, and wait for its end.

    Returns whether it has ended: False as soon as `is_unwanted()`, and the work goes on alone. What it raises is dropped:
    whoever needs what it makes ready does it again, and meets the same error.
    """

    def attempt() -> None:
        with suppress(Exception):
            work()

    # No daemon: the interpreter, where it ends in order, waits for an import that would not survive its end.
    thread = threading.Thread(target=attempt, name="made-ready")
    thread.start()
    while thread.is_alive():
        if is_unwanted():
            return False
        thread.join(POLL_SECONDS)
    return True
