"""For all tests, which run in two processes where `make test` starts them: a file's in one, and all that need a cluster."""

import os
import signal
from pathlib import Path

import pytest

# A runner in the background ignores Ctrl-C, and what it starts would inherit that; here it must be heard.
signal.signal(signal.SIGINT, signal.default_int_handler)
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    # Each computes with its share of the cores, and so do the processes that it starts: others' threads would be in its way.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = Path(__file__).parent / "cluster"
        group = folder if item.path.is_relative_to(folder) else item.path
        item.add_marker(pytest.mark.xdist_group(str(group)))
