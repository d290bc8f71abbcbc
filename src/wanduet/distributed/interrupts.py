"""How a process that was started ignores a terminal's Ctrl-C before it imports anything that takes time.

Imports nothing of the package, nor PyTorch.
"""

import signal
from collections.abc import Callable
from importlib import import_module


class WithoutInterrupts:
    """A process's target, a function of a module: in the process that is started, SIGINT is ignored before that module
    is imported, which may take seconds. Where signals can be blocked from the very start (`launch`), this adds nothing."""

    def __init__(self, target: Callable[..., object]) -> None:
        self._target = target

    def __call__(self, *arguments: object) -> object:
        """Call the target; not done in a spawned process, which has the function itself."""
        return self._target(*arguments)

    def __reduce__(self) -> tuple[Callable[[str, str], object], tuple[str, str]]:
        """Pickled, it is a call of `_ignore_and_import`. A process unpickles its target before the target's arguments."""
        return _ignore_and_import, (self._target.__module__, self._target.__name__)


def _ignore_and_import(module: str, name: str) -> object:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return getattr(import_module(module), name)
