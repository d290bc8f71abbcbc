"""`--help` shows how a command is used, and little else."""

import pytest

COMMANDS = [
    "generate",
    "batch",
    "plan",
    "bench",
    "encode",
    "decode",
    "inspect",
    "download",
    "convert",
    "verify",
    "doctor",
    "serve",
    "ui",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_no_more_than_is_needed(wanduet, command: str) -> None:
    ran = wanduet(command, "--help")
    assert ran.code == 0
    assert ran.out.count(f"wanduet {command}") >= 2  # how it is called, and an example
    assert "env var" not in ran.out
    assert "[default: False]" not in ran.out
    assert "--no-json" not in ran.out
    assert "--no-tf32" in ran.out  # off is what changes something
    assert "WANDUET_NUM_FRAMES=17" in ran.out


def test_switches_that_are_not_shown_work_all_the_same(wanduet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDUET_JSON", "1")
    assert not wanduet("generate", "x", "--model", "miniature", "--dry-run", "--no-json").out.startswith("{")
