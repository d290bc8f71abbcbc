"""Writes the golden files anew: `python tests/golden/record.py [FILE ...]`, from the root of the repository.

Only after a change that is meant to change what they hold; the difference in git then shows what it has changed.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from capture import Workshop, isolated
from golden_files import FILES, write


def main(names: list[str]) -> None:
    for name in names or FILES:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as made, isolated(Path(made)), Workshop(Path(made)) as shop:
            size = write(name, {case: capture(shop) for case, capture in FILES[name].items()})
        print(f"{name}.json: {size} bytes, {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
