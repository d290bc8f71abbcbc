import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))
sys.path.insert(0, str(Path(__file__).parent))

from api import Api
from fake_engine import open_store

from wanduet.jobs.store import JobStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = open_store(tmp_path)
    yield store
    store.close()


@pytest.fixture
def api(store: JobStore) -> Iterator[Api]:
    api = Api(store)
    with api.http:
        yield api


@pytest.fixture
def make_api(store: JobStore) -> Any:
    return lambda settings=None, **options: Api(store, settings, **options)
