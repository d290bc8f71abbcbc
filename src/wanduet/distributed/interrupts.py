"""Lets a spawned process ignore Ctrl-C before its slow imports.

This module must not import PyTorch or anything of the package that does.
"""

import signal
from collections.abc import Callable
from importlib import import_module


class IgnoreSigint:
    """A target for a spawned process that ignores SIGINT before it imports the module of `target`.

    `target` must be a function of a module, whose import may take seconds. Where SIGINT can be blocked before the
    process starts (see launch.py), this has no further effect.
    """

    def __init__(self, target: Callable[..., object]) -> None:
        self._target = target

    def __call__(self, *arguments: object) -> object:
        """Call the target. A spawned process does not use this, because unpickling gives it the target itself."""
        return self._target(*arguments)

    def __reduce__(self) -> tuple[Callable[[str, str], object], tuple[str, str]]:
        """Pickle as a call of `_ignore_and_import`; a process unpickles its target before the target's arguments."""
        return _ignore_and_import, (self._target.__module__, self._target.__name__)


def _ignore_and_import(module: str, name: str) -> object:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return getattr(import_module(module), name)
