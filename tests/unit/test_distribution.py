"""`make test` runs in two processes; a file's tests share one, as otherwise what its fixtures hold is built twice."""

import os
from pathlib import Path

import pytest


@pytest.mark.parametrize("part", range(4))
def test_one_process_runs_the_tests_of_a_file(part: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the processes' common one
    seen = Path(folder, "processes-of-one-file")
    with seen.open("a") as file:
        file.write(f"{os.getpid()}\n")
    assert set(seen.read_text().split()) == {str(os.getpid())}
