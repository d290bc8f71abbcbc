"""What is installed: pinned, and for a server that others reach the same with hashes."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}")


def lines(name: str) -> list[str]:
    """Without comments, continued lines as one."""
    text = (ROOT / name).read_text("utf-8").replace(" \\\n", "\n")
    return [line.rstrip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_every_requirement_is_pinned() -> None:
    for name in ("requirements.txt", "requirements-server.txt", "requirements-dev.txt"):
        assert [line for line in lines(name) if not line.startswith("-") and "==" not in line] == []


def test_what_a_video_needs_installs_from_any_folder() -> None:
    """pip takes a path, as in `-e .`, from the folder in which it is started, not from that of the file."""
    assert [line for line in lines("requirements.txt") if line.startswith(("-", "."))] == []


def test_hashes_are_of_the_same_versions() -> None:
    """If this fails because a version was changed: `make lock`."""
    found: dict[str, int] = {}
    for line in lines("requirements-hashed.txt"):
        if HASH.fullmatch(line):
            found[next(reversed(found))] += 1
        else:
            found[line] = 0
            assert "==" in line
    wanted = [line for name in ("requirements.txt", "requirements-server.txt") for line in lines(name) if "==" in line]
    assert sorted(set(wanted) - found.keys()) == []  # beside them is what they need on one system or another
    assert 0 not in found.values()
