"""For all tests, which run in two or more processes where `make test` starts them: a file's in one, and all that need a cluster.

With WANDUET_TEST_ALL set, as `.ci/run` does, a test of the page or the cluster that would be skipped fails instead.
"""

import gc
import os
import signal
import sys
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.forked import end_server

TESTS = Path(__file__).parent
NEVER_SKIPPED = tuple(TESTS / name for name in ("cluster", "e2e", "unit/cluster", "unit/http/test_page.py"))
# The longest, first: one that began last would leave the other process without work.
FIRST = (
    "cluster",
    "e2e/test_page.py",
    "compiled",
    "e2e/test_server.py",
    "unit/kernels/test_vae.py",
    "faults/test_generate.py",
    "faults/test_jobs_disk.py",
    "faults/test_jobs_server.py",
    "quality/test_miniature.py",
    "parity/test_sharding.py",
)

# A runner in the background ignores Ctrl-C, and what it starts would inherit that; here it must be heard.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    # So does one that `nohup` started with a closed terminal. It goes on; what it starts has the default again.
    signal.signal(signal.SIGHUP, lambda *_: None)
# Where nothing compiled is to be written, each of the hundreds of processes that tests start would compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    # Each computes with its share of the cores, and so do the processes that it starts: others' threads would be in its way.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Nothing that is imported goes away again: garbage is looked for afterwards."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _place(item.path))


@pytest.fixture(scope="module", autouse=True)
def _only_what_a_file_makes_is_looked_through() -> None:
    """An engine that is closed collects garbage: half a second among a million objects of all that tests import."""
    gc.freeze()


_frozen_modules = 0


@pytest.fixture(autouse=True)
def _nor_what_the_test_before_imported() -> None:
    """Some libraries are imported by the first test that needs them, late in its file."""
    global _frozen_modules
    if len(sys.modules) > _frozen_modules + 100:
        _frozen_modules = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_server_is_left() -> Iterator[None]:
    yield
    end_server()


@pytest.hookimpl(optionalhook=True)  # there are tests to run without pytest-xdist, on a machine with a GPU
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What module fixtures hold is built once: servers, models, a cluster.

    Not `--dist loadgroup`: xdist 3.8 names groups in `Item._nodeid`, which pytest 9.2 no longer reads.
    """
    from xdist.scheduler import LoadScopeScheduling

    class OneProcessAFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "tests/cluster" if file.startswith("tests/cluster/") else file

    return OneProcessAFile(config, log)


@cache
def _place(path: Path) -> int:
    return next((place for place, name in enumerate(FIRST) if path.is_relative_to(TESTS / name)), len(FIRST))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    return _not_left_out(item.path, report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    return _not_left_out(getattr(collector, "path", TESTS), report)


def _not_left_out(path: Path, report: Any) -> Any:
    """A failure in place of a skip, where no test may be left out."""
    if (
        os.environ.get("WANDUET_TEST_ALL")
        and report.outcome == "skipped"
        and not hasattr(report, "wasxfail")
        and any(path.is_relative_to(folder) for folder in NEVER_SKIPPED)
    ):
        report.outcome = "failed"
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.longrepr = f"WANDUET_TEST_ALL is set, so that no test here may be skipped. {reason}"
    return report
