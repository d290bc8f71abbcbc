"""How long a thread may keep Python's interpreter while others wait for it."""

import sys
import threading

SECONDS = 5e-4


class ShortTurns:
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


SHORT_TURNS = ShortTurns()
