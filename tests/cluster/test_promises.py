"""What the job store and its workers promise on one machine, they promise on PostgreSQL: the same tests, run over it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres import need, postgres

TESTS = Path(__file__).parents[1]
SHORT = ("unit/cluster/test_store.py",)
LONG = (
    "unit/jobs/test_store.py",  # leases, fences, exactly-once completion
    "unit/jobs/test_identity.py",
    "unit/jobs/test_sweep.py",
    "unit/jobs/test_retention.py",
    "unit/jobs/test_runner.py",
    "unit/cluster/test_controller.py",
    "unit/cluster/test_handover.py",
    "faults/test_jobs.py",  # workers that are killed, or stopped past their leases
)

pytestmark = [pytest.mark.skipif(os.name != "posix", reason="POSIX signals"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    need("psycopg")
    with postgres() as url:
        yield url


@pytest.mark.parametrize("file", [*SHORT, *(pytest.param(file, marks=pytest.mark.slow) for file in LONG)])
def test_on_postgresql(server: str, file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(TESTS / file)]
    environment = {**os.environ, "WANDUET_TEST_POSTGRES": server}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parent, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
