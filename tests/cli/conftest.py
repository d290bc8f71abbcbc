"""The command line, run in this process: exit code, stdout and stderr as a user's shell would have them."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object that must be all of stdout."""
        assert self.out.endswith("\n")
        assert self.out.count("\n") == 1
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value

    @property
    def error(self) -> str:
        """The message of a failure, which stderr tells too."""
        message = self.json["error"]["message"]
        assert message in self.err
        assert "Traceback" not in self.err
        return str(message)


@pytest.fixture
def wanduet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs `wanduet ARGUMENTS` in an empty folder, with a data folder of its own."""
    from wanduet.doors.cli.main import app
    from wanduet.doors.cli.run import run

    for name in [name for name in os.environ if name.startswith("WANDUET_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDUET_DATA_DIR", str(tmp_path / "data"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def call(*arguments: str) -> Ran:
        root = logging.getLogger()
        handlers, level = list(root.handlers), root.level
        root.handlers[:] = []  # so that messages go to stderr as in a process of its own
        capfd.readouterr()
        try:
            code = run(app, arguments)
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)
        return Ran(code, *capfd.readouterr())

    return call


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The folder that commands run in."""
    return tmp_path / "work"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the miniature, to be damaged."""
    import wanduet

    source = Path(wanduet.__file__).parent / "miniature" / "model"
    shutil.copytree(source, tmp_path / "model")
    return tmp_path / "model"
