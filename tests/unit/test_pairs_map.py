"""The map of pairs of events names tests that are there."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_pair_names_a_test_that_exists() -> None:
    rows = re.findall(r"\| (\S+\.py)::(\w+) \|", (TESTS.parent / "docs" / "pairs.md").read_text(encoding="utf-8"))
    assert len(rows) > 80
    gone = [
        f"{path}::{name}" for path, name in rows if f"def {name}(" not in (TESTS / path).read_text(encoding="utf-8")
    ]
    assert gone == []
