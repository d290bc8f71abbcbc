"""What a command writes, and in which encoding."""

import io
import sys

import pytest
from cyclopts import App

from wanduet.doors.cli.run import run


class Stream(io.BytesIO):
    """A file, or a console."""

    def __init__(self, is_console: bool) -> None:
        super().__init__()
        self._is_console = is_console

    def isatty(self) -> bool:
        return self._is_console


@pytest.mark.parametrize(
    ("platform", "is_console", "chosen", "written"),
    [
        ("win32", False, None, "红 é".encode()),
        ("win32", True, None, b"? \xe9"),
        ("win32", False, "cp1252", b"? \xe9"),
        ("linux", False, None, b"? \xe9"),  # as the user's locale says
    ],
)
def test_a_prompt_in_any_script_is_whole_in_a_file_on_windows(
    monkeypatch: pytest.MonkeyPatch, platform: str, is_console: bool, chosen: str | None, written: bytes
) -> None:
    command, stream = App(), Stream(is_console)

    @command.default
    def show() -> None:
        print("红 é", end="")

    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    if chosen is not None:
        monkeypatch.setenv("PYTHONIOENCODING", chosen)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream, encoding="cp1252"))
    monkeypatch.setattr(sys, "platform", platform)
    assert run(command, []) == 0
    assert stream.getvalue() == written
