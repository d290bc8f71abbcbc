"""Engines around the miniature, with a data folder of their own and jobs of a second."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.forked import forked_ranks
from wanduet.config import EngineConfig
from wanduet.engine.job import Job, JobResult, OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.kernels.attention import sparse_steps
from wanduet.kernels.attention.sparse import KeyLists, plain_listed
from wanduet.request import GenerationRequest

SMALL = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 4, "seed": 3}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> EngineConfig:
    return EngineConfig(model="miniature", devices="cpu", data_dir=tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def engine(config) -> Iterator[Engine]:
    with Engine(config) as engine:
        yield engine


@pytest.fixture(scope="module", autouse=True)
def _forked() -> Iterator[None]:
    with forked_ranks():
        yield


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch) -> None:
    monkeypatch.setattr("wanduet.stages.fallback.WAIT_SECONDS", 0.0)


@pytest.fixture
def submit(engine, tmp_path):
    """Submit a small job; flags of OutputOptions by name."""

    def run(name: str = "out", on_step=None, changes: dict | None = None, watch=None, **options) -> Job:
        request = GenerationRequest(**({"prompt": "a red circle on a black background"} | SMALL | (changes or {})))
        return engine.submit(request, OutputOptions(tmp_path / f"{name}.mkv", codec="ffv1", **options), on_step, watch)

    return run


def only_path(result: JobResult) -> Path:
    (video,) = result.videos
    return video.path


@pytest.fixture
def key_lists(monkeypatch) -> Iterator[list[KeyLists]]:
    """The lists of each call of sparse attention in this process."""
    seen: list[KeyLists] = []

    def spy(*given: Any) -> Any:
        seen.append(given[3])
        return plain_listed(*given)

    monkeypatch.setattr(sparse_steps, "PLAIN", sparse_steps.ListedBackend("plain", spy))
    sparse_steps.choose_listed.cache_clear()
    yield seen
    sparse_steps.choose_listed.cache_clear()
