"""Handles Ctrl-C, SIGTERM, a closed terminal and batch systems' signals: the first stops in order, the second at once.

Imports nothing of the package, so that it works while the rest is still being imported.
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

INTERRUPTED = 130  # 128 + SIGINT, as in shells
AGAIN_SECONDS = 0.02  # delay until a lost signal is raised again
# A terminal that closes sends SIGHUP, Windows' Ctrl-Break SIGBREAK; the system sends SIGXCPU at the CPU time limit;
# batch systems send SIGUSR1 or SIGUSR2 some time before they end a job.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK", "SIGXCPU", "SIGUSR1", "SIGUSR2")
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
_CPU_LIMIT = getattr(signal, "SIGXCPU", None)


class StopSignals:
    """The signals received so far.

    `as_json` prints failures to stdout, too. `answered` is set once the result or the failure is being printed; signals
    are ignored from then on, so that stdout never gets a second JSON object.
    """

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.answered = False
        self._first: int | None = None
        self._late = 0
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    @property
    def exit_code(self) -> int:
        """128 + the first signal's number: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP, 152 for SIGXCPU."""
        return INTERRUPTED if self._first is None or sys.platform == "win32" else 128 + self._first

    def handle(self, number: int, _: FrameType | None) -> None:
        """Handle a signal. Raises KeyboardInterrupt for the first one."""
        if number == getattr(signal, "SIGHUP", None):
            self._leave_terminal()
        if number == _CPU_LIMIT:
            if self.answered or self._first is not None:  # SIGXCPU repeats after each second of CPU time
                return
            print_failure("The limit of CPU time is reached (SIGXCPU).", "cancelled", as_json=False)
        if self.answered:
            self._late += 1
            if self._late > 1:  # writing blocks if the reader of the output has stopped
                os._exit(self.exit_code)
            return
        if self._first is None:
            self._first = number
            raise KeyboardInterrupt
        self.answered = True
        print_failure("Stopped at once.", "cancelled", self.as_json)
        os._exit(self.exit_code)  # threads may be in a step that takes minutes

    def unraisable(self, hook_args: "UnraisableHookArgs") -> None:
        """Handle exceptions that the interpreter cannot raise (`sys.unraisablehook`).

        A signal's KeyboardInterrupt is lost if it is raised in a finalizer or in a weak reference's callback; the
        signal is raised again after AGAIN_SECONDS.
        """
        number = self._first
        if number is None or self.answered or not issubclass(hook_args.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(hook_args)
            return
        self._first = None
        again = threading.Timer(AGAIN_SECONDS, self._come_again, (number,))
        again.daemon = True
        again.start()

    def _come_again(self, number: int) -> None:
        if self._first is None:  # else another signal has come since
            _thread.interrupt_main(signal.Signals(number))

    def _leave_terminal(self) -> None:
        """Redirect stdout and stderr to the null device if their terminal is gone: writing there would fail."""
        for fd in self._terminals:
            if not os.isatty(fd):
                with suppress(OSError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


_CURRENT: ContextVar[StopSignals | None] = ContextVar("wanduet_stop_signals", default=None)


@contextmanager
def stop_signals(as_json: bool = False) -> Iterator[StopSignals]:
    """Handle stop signals in this block; inside another such block, yield the outer one's state.

    Signals that have another handler or are ignored (`nohup`) are left alone; so are all signals outside of the main
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
            if signal.getsignal(number) == stops.handle:  # a server may have set its own handler
                signal.signal(number, before[number])
        _CURRENT.reset(token)


def begin_answer() -> None:
    """Mark that the result is about to be printed: later signals stop nothing."""
    stops = _CURRENT.get()
    if stops is not None:
        stops.answered = True


def print_failure(message: str, code: str, as_json: bool, field: str | None = None) -> None:
    """Print a message to stderr and, with `as_json`, as the one JSON object to stdout.

    Errors of writing are ignored.
    """
    with suppress(OSError, ValueError, RuntimeError):  # RuntimeError: a signal came in the middle of a write
        print(message, file=sys.stderr, flush=True)
    if as_json:
        with suppress(OSError, ValueError, RuntimeError):
            answer = {"error": {"message": message, "code": code, "param": field}}
            print(to_json(answer), flush=True)


def to_json(value: object) -> str:
    """Return one line of JSON; ASCII only, unless stdout is UTF-8, since other encodings lose characters."""
    is_utf8 = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
    return json.dumps(value, ensure_ascii=not is_utf8)
