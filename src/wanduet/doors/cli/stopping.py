"""Ctrl-C, SIGTERM, a closed terminal, a batch system's signals: the first lets the command stop in order, the second
ends it at once.

Imports nothing of the package: it works while the rest is still being imported.
"""

import _thread
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

INTERRUPTED = 130  # 128 + SIGINT, as shells count
AGAIN_SECONDS = 0.02  # after which a signal that was lost comes again
# A terminal that closes sends SIGHUP, Windows' Ctrl-Break SIGBREAK; the system sends SIGXCPU at the limit of CPU time;
# batch systems send SIGUSR1 or SIGUSR2 some time before they end a job.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK", "SIGXCPU", "SIGUSR1", "SIGUSR2")
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
_CPU_LIMIT = getattr(signal, "SIGXCPU", None)


class StopSignals:
    """What has come so far. `as_json`: a failure is told on stdout too. `answered`: the result, or the failure, is
    being printed; a signal then changes nothing, so that stdout never gets a second JSON object.
    """

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.answered = False
        self._first: int | None = None
        self._late = 0
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    @property
    def exit_code(self) -> int:
        """128 and the number of the signal that came first: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP, 152 for
        SIGXCPU."""
        return INTERRUPTED if self._first is None or sys.platform == "win32" else 128 + self._first

    def handle(self, number: int, _: FrameType | None) -> None:
        """The signals' handler. Raises KeyboardInterrupt for the first one."""
        if number == getattr(signal, "SIGHUP", None):
            self._leave_terminal()
        if number == _CPU_LIMIT:
            if self.answered or self._first is not None:  # it comes again after each second of CPU time
                return
            print_failure("The limit of CPU time is reached (SIGXCPU).", "cancelled", as_json=False)
        if self.answered:
            self._late += 1
            if self._late > 1:  # whoever should read our output does not
                os._exit(self.exit_code)
            return
        if self._first is None:
            self._first = number
            raise KeyboardInterrupt
        self.answered = True
        print_failure("Stopped at once.", "cancelled", self.as_json)
        os._exit(self.exit_code)  # threads may be in the middle of a step that takes minutes

    def unraisable(self, found: "UnraisableHookArgs") -> None:
        """The interpreter's hook for errors that nobody can catch. Where a signal's KeyboardInterrupt is one of them, for
        it came in a finalizer or a callback of a weak reference, the signal comes again a moment later."""
        number = self._first
        if number is None or self.answered or not issubclass(found.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(found)
            return
        self._first = None
        again = threading.Timer(AGAIN_SECONDS, self._come_again, (number,))
        again.daemon = True
        again.start()

    def _come_again(self, number: int) -> None:
        if self._first is None:  # else another one has come meanwhile
            _thread.interrupt_main(signal.Signals(number))

    def _leave_terminal(self) -> None:
        """Send what is printed from now on nowhere if the terminal is gone: writing there would fail."""
        for fd in self._terminals:
            if not os.isatty(fd):
                with suppress(OSError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


_CURRENT: ContextVar[StopSignals | None] = ContextVar("wanduet_stop_signals", default=None)


@contextmanager
def stop_signals(as_json: bool = False) -> Iterator[StopSignals]:
    """Handle the signals in this block; inside another such block, the outer one's state.

    A signal that somebody else handles, or that is ignored (`nohup`), stays as it is; so do all outside of the main
    thread.
    """
    outer = _CURRENT.get()
    if outer is not None:
        outer.as_json = as_json
        yield outer
        return
    stops = StopSignals(as_json)
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    taken = [number for number in _SIGNALS if before[number] in usual]
    if threading.current_thread() is not threading.main_thread():
        taken = []
    token = _CURRENT.set(stops)
    for number in taken:
        signal.signal(number, stops.handle)
    hook = sys.unraisablehook
    if hook is sys.__unraisablehook__:
        sys.unraisablehook = stops.unraisable
    try:
        yield stops
    finally:
        if sys.unraisablehook == stops.unraisable:
            sys.unraisablehook = hook
        for number in taken:
            if signal.getsignal(number) == stops.handle:  # a server may have set its own
                signal.signal(number, before[number])
        _CURRENT.reset(token)


def begin_answer() -> None:
    """Said before the result is printed: what comes from now on is too late to stop anything."""
    stops = _CURRENT.get()
    if stops is not None:
        stops.answered = True


def print_failure(message: str, code: str, as_json: bool, field: str | None = None) -> None:
    """A message on stderr and, if wanted, as the one JSON object on stdout. What cannot be printed is left out."""
    with suppress(OSError, ValueError, RuntimeError):  # RuntimeError: a signal came in the middle of a write
        print(message, file=sys.stderr, flush=True)
    if as_json:
        with suppress(OSError, ValueError, RuntimeError):
            answer = {"error": {"message": message, "code": code, "param": field}}
            print(to_json(answer), flush=True)


def to_json(value: object) -> str:
    """One line of JSON. A console of another encoding would turn what it cannot show into question marks."""
    is_utf8 = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
    return json.dumps(value, ensure_ascii=not is_utf8)
