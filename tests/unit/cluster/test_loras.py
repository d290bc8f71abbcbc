"""Jobs with LoRA go to nodes that have the files; if none has, the job says so while it waits."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))

from fake_engine import FakeEngine, postgres_url

from wanduet.cluster.fit import ANYWHERE, parse_demand
from wanduet.cluster.loras import NodeLoras
from wanduet.cluster.store import ClusterStore
from wanduet.config import EngineConfig
from wanduet.errors import InvalidRequestError
from wanduet.family.wan21 import WAN_1_3B
from wanduet.jobs.attempt import AttemptSettings
from wanduet.jobs.files import JobFiles
from wanduet.jobs.records import NewJob, demand_of, loras_tag
from wanduet.jobs.runner import Runner, RunnerSettings
from wanduet.weights.adapters.files import open_adapter

STYLE = "style.safetensors"
REQUEST = {"prompt": "x", "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.0}


def write(path: Path, value: float = 1.0) -> dict[str, Any]:
    """Write a LoRA file; return it as a request names it."""
    path.parent.mkdir(exist_ok=True)
    save_file({"blocks.0.self_attn.q.diff": np.full((2, 2), value, np.float32)}, path)
    return {"name": path.name, "strength": 1.0, "sha256": open_adapter(path).sha256()}


@pytest.fixture
def at_node(tmp_path: Path) -> Iterator[Callable[[str], ClusterStore]]:
    """The store of a replica on a node, whose folder of LoRA has the node's name."""
    opened: list[ClusterStore] = []

    def open_one(name: str) -> ClusterStore:
        files = JobFiles(tmp_path / "data")
        opened.append(ClusterStore(files, postgres_url(tmp_path), fit_of=lambda demand: ANYWHERE))
        opened[-1].loras = NodeLoras(tmp_path / name)
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


def submit(store: ClusterStore, *loras: dict[str, Any]) -> str:
    request = REQUEST | ({"loras": list(loras)} if loras else {})
    return store.submit(NewJob("ann", "m", request)).job.id


def test_a_node_without_the_file_takes_other_jobs(at_node: Any, tmp_path: Path) -> None:
    style, motion = write(tmp_path / "one" / STYLE), write(tmp_path / "one" / "motion.safetensors", 2.0)
    write(tmp_path / "two" / STYLE)
    one, two = at_node("one"), at_node("two")
    both, plain, alone = submit(one, style, motion), submit(one), submit(one, style)
    assert [two.claim("two", 30.0).job.id for _ in range(2)] == [plain, alone]
    assert two.claim("two", 30.0) is None
    assert one.claim("one", 30.0).job.id == both


def test_a_file_of_the_same_name_with_another_content_is_another(at_node: Any, tmp_path: Path) -> None:
    path = tmp_path / "one" / STYLE
    store, job = at_node("one"), submit(at_node("one"), write(path))
    write(path, 2.0)
    assert store.claim("one", 30.0) is None
    path.unlink()
    assert store.claim("one", 30.0) is None
    write(path)
    assert store.claim("one", 30.0).job.id == job


def test_a_file_that_goes_after_the_claim_leaves_the_job_to_another_node(at_node: Any, tmp_path: Path) -> None:
    class Engine(FakeEngine):
        def submit(self, request: Any, *args: Any, **options: Any) -> Any:
            runner.drain()
            (tmp_path / "one" / STYLE).unlink()
            raise InvalidRequestError("loras", STYLE, "a file that exists")

    one, two = at_node("one"), at_node("two")
    job = submit(one, write(tmp_path / "one" / STYLE))
    write(tmp_path / "two" / STYLE)
    engine = Engine(EngineConfig(data_dir=one.files.folder))
    runner = Runner(one, engine, RunnerSettings(attempt=AttemptSettings(poll_seconds=0.01)), hooks=engine.hooks)
    runner.run()
    assert one.get(job).status == "queued"
    assert one.claim("one", 30.0) is None
    assert two.claim("two", 30.0).job.id == job


def test_a_demand_tells_files_apart_and_nothing_else() -> None:
    style = {"name": STYLE, "strength": 0.5, "sha256": "0" * 64}
    demand = demand_of(REQUEST | {"loras": [style]})
    assert demand_of(REQUEST | {"loras": [style | {"strength": 1.0}]}) == demand
    assert demand_of(REQUEST | {"loras": [style | {"sha256": "1" * 64}]}) != demand
    assert loras_tag(demand_of(REQUEST)) is None
    assert parse_demand(demand, WAN_1_3B) == parse_demand(demand_of(REQUEST), WAN_1_3B)
