"""The processes that a server starts run this package, from whatever folder, and nothing that lies in that folder."""

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

from wanduet.jobs import child
from wanduet.jobs.child import child_environment, module_command

NAMES = ("json", "structlog", "av", "torch", "numpy", "sqlalchemy", "sitecustomize", "usercustomize", "wanduet")


@pytest.fixture
def poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, where each of these modules would leave a mark if it were executed."""
    folder = tmp_path / "poisoned"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(
            f"open({str(tmp_path / 'executed')!r}, 'a').write({name!r})\nraise SystemExit(9)\n"
        )
    monkeypatch.chdir(folder)
    return tmp_path / "executed"


@pytest.mark.parametrize("path", ["", os.pathsep, "."])
def test_a_child_does_not_execute_what_lies_in_its_folder(poisoned: Path, path: str) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{path if path != '.' else ''}{os.pathsep}"}
    command = module_command("wanduet.jobs.worker", "--help")
    done = subprocess.run(command, env=child_environment(environment), capture_output=True, text=True)
    assert (done.returncode, "usage: python -m wanduet.jobs.worker" in done.stdout) == (0, True), done.stderr
    assert not poisoned.exists()


def test_a_child_starts_its_own_children_so_too(poisoned: Path) -> None:
    code = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', 'import json, av']))"
    command = [module_command("x")[0], "-P", "-c", code]
    assert subprocess.run(command, env=child_environment(os.environ)).returncode == 0
    assert not poisoned.exists()


def test_a_checkout_is_passed_on_and_an_installed_package_need_not_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = Path(child.__file__).resolve().parents[2]
    given = os.pathsep.join(["", "relative", str(tmp_path / "absolute"), ""])
    found = child_environment({"PYTHONPATH": given, "A": "b"})
    entries = [str(tmp_path / "relative"), str(tmp_path / "absolute")]
    assert found == {"PYTHONPATH": os.pathsep.join([*entries, str(source)]), "A": "b", "PYTHONSAFEPATH": "1"}
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(source))
    assert child_environment({"PYTHONPATH": given})["PYTHONPATH"] == os.pathsep.join(entries)
    assert "PYTHONPATH" not in child_environment({})
