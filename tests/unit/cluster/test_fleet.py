"""What Ray's side makes of replicas that do not answer, with a Ray that only notes what it is asked."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("ray")

from wanduet.cluster import ray_fleet
from wanduet.cluster.ray_fleet import RayFleet
from wanduet.cluster.replica import ReplicaStatus
from wanduet.cluster.settings import ClusterSettings
from wanduet.cluster.shapes import ReplicaView, Shape, declared_devices
from wanduet.config import EngineConfig
from wanduet.jobs.worker import WorkerSettings

SHAPE = Shape(declared_devices("1x24GiB"))


class Bench:
    """A fleet with one replica; `answers`: whether it answers just now."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = ClusterSettings(WorkerSettings(EngineConfig(data_dir=folder)))
        self.name = f"{ray_fleet.PREFIX}{settings.fingerprint}-1"
        self.status = ReplicaStatus("w", ("job",), 0.0, False, False, SHAPE, "n1", 4711)
        self.now, self.answers, self.killed = 1000.0, True, []
        actor = SimpleNamespace(status=SimpleNamespace(remote=lambda: "answer"), drain=None)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(ray_fleet.ray, "wait", lambda asked, **how: ((asked if self.answers else []), []))
        monkeypatch.setattr(ray_fleet.ray, "get", lambda answer: self.status)
        monkeypatch.setattr(ray_fleet.ray, "kill", lambda actor: self.killed.append("actor"))
        monkeypatch.setattr(ray_fleet.ray, "nodes", lambda: [{"NodeID": "n1", "Alive": True}])
        monkeypatch.setattr(ray_fleet, "_remove_group", lambda name: None)
        monkeypatch.setattr(ray_fleet, "_end_process", lambda status: self.killed.append(status.pid))
        self.fleet = object.__new__(RayFleet)
        self.fleet._settings = settings
        self.fleet._members = {self.name: ray_fleet._Member(actor, ReplicaView(self.name, "n1", SHAPE))}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_a_replica_that_was_up_and_never_answers_again_is_ended_and_its_job_taken(bench: Bench) -> None:
    views, _ = bench.fleet.poll()
    assert [view.state for view in views] == ["ready"]
    bench.answers = False
    for _ in range(29):
        bench.now += 10.0
        assert bench.fleet.poll()[1] == ()
    bench.now += 10.0
    views, (gone,) = bench.fleet.poll()
    assert (views, gone.worker, gone.lost, gone.failed) == ((), "w", False, False)
    assert bench.killed == [4711, "actor"]


def test_a_replica_that_is_slow_to_answer_stays(bench: Bench) -> None:
    bench.fleet.poll()
    for _ in range(10):
        bench.answers = False
        bench.now += 250.0
        assert bench.fleet.poll()[1] == ()
        bench.answers = True
        bench.fleet.poll()
    assert bench.killed == []
