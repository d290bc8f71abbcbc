"""Shorter GIL switch intervals while models load, and imports that a cancelled job does not wait for."""

import sys
import threading
from collections.abc import Callable
from contextlib import suppress

SECONDS = 5e-4
POLL_SECONDS = 0.05


class ShortSwitches:
    """Makes Python switch threads ten times as often between `begin` and `end`.

    Each call into PyTorch releases the GIL, and gets it back after another thread's switch interval. An import or a
    compiler releases it only then; beside one, a load waits five milliseconds at each of some thousand calls. Calls may
    nest: the last `end` restores the process's interval, unless the program has changed it meanwhile.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun = 0
        self._before = self._ours = 0.0

    def begin(self) -> None:
        """Shorten the switch interval."""
        with self._lock:
            if self._begun == 0:
                self._before = sys.getswitchinterval()
                sys.setswitchinterval(min(SECONDS, self._before))
                self._ours = sys.getswitchinterval()
            self._begun += 1

    def end(self) -> None:
        """Restore the switch interval, unless another `begin` has no `end` yet."""
        with self._lock:
            self._begun -= 1
            if self._begun == 0 and sys.getswitchinterval() == self._ours:
                sys.setswitchinterval(self._before)


SHORT_SWITCHES = ShortSwitches()


def finish_unless(is_unwanted: Callable[[], bool], work: Callable[[], object]) -> bool:
    """Run work that cannot be stopped, such as an import of seconds, in its own thread, and wait for it.

    Return True once it has ended, False as soon as `is_unwanted()` is True; the work then goes on in its thread. Its
    exceptions are ignored: the code that needs the result repeats the work, and gets the same error.
    """

    def attempt() -> None:
        with suppress(Exception):
            work()

    # Not a daemon: at an orderly exit the interpreter waits for it, as an import does not survive the shutdown.
    thread = threading.Thread(target=attempt, name="made-ready")
    thread.start()
    while thread.is_alive():
        if is_unwanted():
            return False
        thread.join(POLL_SECONDS)
    return True
