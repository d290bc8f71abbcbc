"""The shell completes commands and flags once `wanduet --install-completion` has run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_a_script_for_each_shell(wanduet, work: Path, shell: str) -> None:
    ran = wanduet("--install-completion", "--shell", shell, "--output", "script")
    assert ran.code == 0
    text = (work / "script").read_text(encoding="utf-8")
    assert "generate" in text
    assert "strategy" in text


@pytest.mark.skipif(sys.platform == "win32" or shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_what_is_typed(wanduet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ran = wanduet("--install-completion", "--shell", "bash")
    assert ran.code == 0
    script = ran.out.splitlines()[0].partition(": ")[2]
    assert script in (tmp_path / ".bashrc").read_text()
    typed = f". {script}; COMP_WORDS=(wanduet generate x --strat); COMP_CWORD=3; _wanduet; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", typed], capture_output=True, text=True, env=os.environ)
    assert done.stdout.split() == ["--strategy"]


def test_a_shell_that_is_not_known(wanduet, monkeypatch: pytest.MonkeyPatch) -> None:
    from cyclopts.completion import detect

    def unknown() -> str:
        raise detect.ShellDetectionError("none")

    monkeypatch.setattr(detect, "detect_shell", unknown)
    ran = wanduet("--install-completion")
    assert ran.code == 2
    assert "--shell bash" in ran.err
