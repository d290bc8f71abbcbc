"""What a command writes, and in which encoding."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from cyclopts import App

from wanduet.doors.cli.run import run


@pytest.mark.parametrize("source", ["flag", "environment", "file"])
def test_a_setting_with_an_earlier_name_is_refused_with_its_new_one(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from wanduet.doors.cli.main import app

    monkeypatch.chdir(tmp_path)
    flags = ["plan", "--model", "random:1.3b", *(["--speeds", "2,1"] if source == "flag" else [])]
    if source == "environment":
        monkeypatch.setenv("WANDUET_SPEEDS", "2,1")
    elif source == "file":
        (tmp_path / "wanduet.toml").write_text('speeds = "2,1"\n')
    assert run(app, flags) == 2
    said = capsys.readouterr().err
    assert {
        "flag": "--speeds is named --device-speeds now.",
        "environment": "WANDUET_SPEEDS is named WANDUET_DEVICE_SPEEDS now.",
        "file": "wanduet.toml: speeds is named device_speeds now.",
    }[source] in said


@pytest.mark.parametrize(
    ("file", "flags", "speed", "cache"),
    [
        ('speed = "exact"', ["--step-cache", "easycache"], None, "easycache:0.05"),
        ('step_cache = "easycache:0.3"', ["--speed", "fine"], "fine", "easycache:0.05"),
        ('speed = "near"', ["--loss-budget", "25"], "fine", "easycache:0.05"),
        ("sparse = 0.5", ["--loss-budget", "25"], "fine", "easycache:0.05"),
        ("loss_budget = 25", ["--speed", "near"], "near", "easycache:0.02"),
        ('speed = "near"\nstep_cache = "easycache:0.3"', [], "near", "easycache:0.3"),
    ],
)
def test_a_flag_overrides_what_the_file_says_of_the_same(
    file: str,
    flags: list[str],
    speed: str | None,
    cache: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: Any,
) -> None:
    from wanduet.doors.cli.main import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "wanduet.toml").write_text(f"{file}\n")
    assert run(app, ["plan", "--model", "random:1.3b", "--hardware", "80GiB,ram=80GiB", "--json", *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan.get("speed") == speed
    assert {one["setting"]: one["value"] for one in plan["choices"]}["step_cache"] == cache


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
