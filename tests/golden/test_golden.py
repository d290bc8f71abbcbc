"""Nothing that a user sees or computes has changed unnoticed: everything in `data/` is captured again and compared.

`record.py` writes the files anew, after a change that is meant. Numbers are compared by a sample of their values, because
kinds of CPUs differ in the last bits; with WANDUET_GOLDEN_EXACT=1 by their hashes too, on the kind that recorded them.
"""

import gc
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from capture import Workshop, isolated
from golden_files import FILES, SLOW, differences, read

CASES = [
    pytest.param(file, case, id=f"{file}: {case}", marks=[pytest.mark.slow] * (case in SLOW.get(file, ())))
    for file, cases in FILES.items()
    for case in cases
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    folder: Path = tmp_path_factory.mktemp("golden")
    with isolated(folder), Workshop(folder) as shop:
        shop.run()
        gc.freeze()  # engines that close collect garbage: seconds in all, among the million objects that are imported now
        yield shop
    gc.unfreeze()


@cache
def golden(file: str) -> dict[str, Any]:
    return read(file)


@pytest.mark.parametrize(("file", "case"), CASES)
def test_is_as_recorded(shop: Workshop, file: str, case: str) -> None:
    got = FILES[file][case](shop)
    found = list(differences(golden(file)[case], got, loose="bfloat16" in case))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("file", FILES)
def test_each_case_is_recorded(file: str) -> None:
    assert sorted(golden(file)) == sorted(FILES[file])
