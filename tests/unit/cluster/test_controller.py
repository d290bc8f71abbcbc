"""The controller against a fleet without Ray: it brings what is missing, ends what is not wanted, blames nobody."""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import sqlalchemy as sa

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))

from fake_engine import postgres_url

from wanduet.cluster.autoscaler import ScaleSettings, Start
from wanduet.cluster.controller import FIRST_PAUSE, LEADER_LOCK, Controller, Leadership
from wanduet.cluster.fit import Fit
from wanduet.cluster.settings import ClusterSettings
from wanduet.cluster.shapes import Expected, Gone, Node, ReplicaView, declared_devices
from wanduet.cluster.store import ClusterStore
from wanduet.cluster.trouble import find_trouble
from wanduet.config import EngineConfig
from wanduet.jobs.files import JobFiles
from wanduet.jobs.housekeeping import Housekeeper
from wanduet.jobs.records import ModelId, NewJob, demand_of, loras_tag
from wanduet.jobs.worker import WorkerSettings

REQUEST = {"prompt": "x", "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.0}

STYLE = {"name": "style.safetensors", "strength": 1.0, "sha256": "0123456789ab" + "0" * 52}


class FakeFleet:
    def __init__(self) -> None:
        self.all_nodes = [Node("n1", "one", declared_devices("2x24GiB"), 2**36, 8)]
        self.live: dict[str, ReplicaView] = {}
        self.gone: list[Gone] = []
        self.closed = False

    def nodes(self, drained: frozenset[str]) -> tuple[Node, ...]:
        return tuple(self.all_nodes)

    def start(self, start: Start) -> None:
        name = f"r{len(self.live)}"
        self.live[name] = ReplicaView(name, start.node, start.shape, "ready", f"worker-{name}")

    def drain(self, replica: str) -> None:
        self.gone.append(Gone(replica, "n1", self.live.pop(replica).worker))

    def poll(self) -> tuple[tuple[ReplicaView, ...], tuple[Gone, ...]]:
        gone, self.gone = tuple(self.gone), []
        return tuple(self.live.values()), gone

    def close(self) -> None:
        self.closed = True

    def lose(self, name: str, **options: bool) -> None:
        one = self.live.pop(name)
        self.gone.append(Gone(name, one.node, one.worker, **options))


class Bench:
    """A controller, its store and fleet, and the clocks in hand."""

    def __init__(self, folder: Path, model: ModelId | None = None, **scale: object) -> None:
        self.now = 1000.0
        self.fleet = FakeFleet()
        self.store = ClusterStore(
            JobFiles(folder), postgres_url(folder), fit_of=lambda demand: Fit(True), clock=lambda: self.now
        )
        settings = ClusterSettings(
            WorkerSettings(EngineConfig(data_dir=folder)), scale=ScaleSettings(**{"minimum": 0, **scale})
        )
        self.fits = lambda shape, demand: not demand.startswith("9984")
        fitter = SimpleNamespace(on=lambda shape: lambda demand: Fit(self.fits(shape, demand)))
        self.make = lambda: Controller(
            self.store, self.fleet, fitter, settings, monotonic=lambda: self.now, model=model
        )
        self.restart()

    def restart(self) -> None:
        """Another controller goes on with the same fleet and store."""
        self.controller = self.make()

    def submit(self, **changes: object) -> str:
        return self.store.submit(NewJob("ann", "m", {**REQUEST, **changes})).job.id


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.store.close()


def test_a_job_brings_a_replica_and_idleness_takes_it_away(bench: Bench) -> None:
    bench.controller.reconcile()
    assert bench.fleet.live == {}
    bench.submit()
    bench.controller.reconcile()
    bench.controller.reconcile()
    assert [(one["id"], one["node"], one["state"]) for one in bench.store.replicas()] == [("r0", "one", "ready")]
    bench.store.complete(bench.store.claim("worker-r0", 30.0), [])
    one = bench.fleet.live["r0"]
    bench.fleet.live["r0"] = ReplicaView("r0", "n1", one.shape, "ready", one.worker, (), 1e6)
    bench.controller.reconcile()
    assert bench.fleet.live == {}


@pytest.mark.parametrize("lost", [False, True])
def test_a_dead_worker_gives_its_job_up_at_once_and_a_lost_node_is_not_the_jobs_fault(bench: Bench, lost: bool) -> None:
    job = bench.submit()
    bench.controller.reconcile()
    for _ in range(5):  # more often than a job may crash at one place
        assert bench.store.claim("worker-r0", 1e6) is not None
        bench.fleet.lose("r0", lost=lost)
        bench.controller.reconcile()
        bench.controller.tidy()
        if bench.store.get(job).finished:
            break
        assert bench.store.get(job).status == "queued"
        bench.controller.reconcile()
    assert bench.store.get(job).status == ("queued" if lost else "failed")


def test_a_node_where_replicas_fail_rests_longer_each_time(bench: Bench) -> None:
    bench.submit()
    pause = FIRST_PAUSE
    for _ in range(3):
        bench.controller.reconcile()
        bench.fleet.lose("r0", failed=True)
        bench.controller.reconcile()
        bench.now += pause - 1
        bench.controller.reconcile()
        assert bench.fleet.live == {}
        assert bench.store.waiting()[0].count == 1  # its node is there: it fits somewhere, and waits
        bench.now += 2
        pause *= 2
    bench.controller.reconcile()
    assert list(bench.fleet.live) == ["r0"]


def test_what_fits_no_node_is_refused_after_a_while_and_not_while_no_node_is_there(bench: Bench) -> None:
    huge, small = bench.submit(height=9984), bench.submit()
    nodes, bench.fleet.all_nodes = bench.fleet.all_nodes, []
    bench.controller.reconcile()
    bench.now += 1000
    bench.fleet.all_nodes = nodes
    bench.controller.reconcile()  # from now on it is known to fit nothing
    assert bench.store.get(huge).status == "queued"
    bench.now += 1000
    bench.controller.reconcile()
    found = bench.store.get(huge)
    assert found.error is not None
    assert (found.status, found.error.code) == ("failed", "does_not_fit")
    assert "9984x32x5" in found.error.message
    assert bench.store.get(small).status == "queued"


def test_a_job_waits_for_the_node_that_it_fits_while_that_is_away(bench: Bench) -> None:
    large = Node("n2", "two", declared_devices("1x80GiB"), 2**36, 8)
    bench.fits = lambda shape, demand: not demand.startswith("9984") or shape.name == "1x80GiB"
    bench.fleet.all_nodes.append(large)
    bench.controller.reconcile()
    job = bench.submit(height=9984)
    bench.fleet.all_nodes.remove(large)
    for _ in range(20):
        bench.controller.reconcile()
        bench.now += 1000
    assert bench.store.get(job).status == "queued"
    bench.fleet.all_nodes.append(large)
    bench.controller.reconcile()
    assert [one.node for one in bench.fleet.live.values()] == ["n2"]
    bench.fleet.all_nodes.remove(large)
    bench.fleet.live.clear()
    for _ in range(200):  # more than a day
        bench.controller.reconcile()
        bench.now += 1000
    assert bench.store.get(job).status == "failed"


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Bench]:
    """A fleet of two nodes with a GPU each, and no more replicas."""
    bench = Bench(tmp_path / "data", maximum=2)
    bench.fleet.all_nodes = [Node(name, name, declared_devices("1x24GiB"), 2**36, 8) for name in ("one", "two")]
    yield bench
    bench.store.close()


def lacks(bench: Bench, name: str) -> None:
    """Let the replicas of a node report that they lack the file."""
    tag = loras_tag(demand_of({"loras": [STYLE]}))
    for key, one in bench.fleet.live.items():
        if one.node == name:
            bench.fleet.live[key] = ReplicaView(key, name, one.shape, "ready", one.worker, lacks=frozenset([tag]))


def test_what_one_node_lacks_brings_a_replica_on_another(pair: Bench) -> None:
    job = pair.submit(loras=[STYLE])
    pair.controller.reconcile()
    (first,) = [one.node for one in pair.fleet.live.values()]
    lacks(pair, first)
    pair.controller.reconcile()
    assert sorted(one.node for one in pair.fleet.live.values()) == ["one", "two"]
    pair.controller.reconcile()
    assert pair.store.get(job).phase == ""


def test_what_no_node_has_waits_with_the_reason_and_fails_after_a_while(pair: Bench) -> None:
    job, plain = pair.submit(loras=[STYLE]), pair.submit(num_frames=9)
    for _ in range(3):
        pair.controller.reconcile()
        lacks(pair, "one")
        lacks(pair, "two")
    pair.now += 30  # long enough to drain replicas for a job that another one would take
    pair.controller.reconcile()
    assert len(pair.fleet.live) == 2
    reason = pair.store.get(job).report["waiting"]
    assert all(part in reason for part in (STYLE["name"], "0123456789ab", "(one, two)")), reason
    assert pair.store.get(plain).phase == ""
    pair.now += 1000
    pair.controller.reconcile()
    error = pair.store.get(job).error
    assert error is not None
    assert (error.code, STYLE["name"] in error.message) == ("lora_lost", True)
    assert pair.store.get(plain).status == "queued"


def test_a_file_that_comes_back_ends_the_wait(pair: Bench) -> None:
    job = pair.submit(loras=[STYLE])
    for _ in range(3):
        pair.controller.reconcile()
        lacks(pair, "one")
        lacks(pair, "two")
    assert pair.store.get(job).phase == "waiting"
    for key, one in pair.fleet.live.items():
        pair.fleet.live[key] = ReplicaView(key, one.node, one.shape, "ready", one.worker)
    pair.controller.reconcile()
    assert (pair.store.get(job).phase, len(pair.fleet.live)) == ("", 2)


def test_the_end_drains_every_replica(tmp_path: Path) -> None:
    bench = Bench(tmp_path, minimum=2)
    bench.controller.reconcile()
    assert len(bench.fleet.live) == 2
    bench.controller.drain()
    bench.controller.run()
    assert (bench.fleet.live, bench.store.replicas(), bench.fleet.closed) == ({}, [], True)
    bench.store.close()


def test_of_two_controllers_one_leads_until_its_connection_is_gone(bench: Bench) -> None:
    database = bench.store.database
    first, second = Leadership(database), Leadership(database)
    assert first.acquire()
    if database.dialect.name == "sqlite":  # one machine's: nobody competes
        assert second.acquire()
        return
    assert not second.acquire()
    assert first.acquire()
    with database.connect() as connection:
        holders = sa.text(f"SELECT pg_terminate_backend(pid) FROM pg_locks WHERE objid = {LEADER_LOCK} AND granted")
        assert connection.execute(holders).scalars().all() == [True]
    assert second.acquire()
    assert not first.acquire()
    second.release()
    assert first.acquire()
    first.release()


def test_settings_survive_the_command_line() -> None:
    expected = (Expected("2x24GiB", Node("", "", declared_devices("2x24GiB"), 2**36, 8).shape(2)),)
    settings = ClusterSettings(
        WorkerSettings(EngineConfig(data_dir=Path("/data"))), scale=ScaleSettings(expected=expected), storage="s3://b"
    )
    assert ClusterSettings.from_json(settings.to_json()) == settings
    assert settings.fingerprint == ClusterSettings.from_json(settings.to_json()).fingerprint


def test_replicas_poll_less_often_in_a_large_fleet() -> None:
    def poll(maximum: int) -> float:
        settings = ClusterSettings(WorkerSettings(EngineConfig()), scale=ScaleSettings(maximum=maximum))
        return settings.runner().attempt.poll_seconds

    assert poll(1) == poll(64) == 0.25
    assert 2.0 < poll(1000) < 30.0 / 4


def test_a_cluster_without_gpus_says_so_at_once_and_what_to_do(bench: Bench) -> None:
    bench.fleet.all_nodes = [Node("n1", "one", (), 2**36, 8, computes=False)]
    bench.fits = lambda shape, demand: False
    job = bench.submit()
    bench.controller.reconcile()
    for reason in (bench.store.trouble(), bench.store.get(job).waits_for):
        assert "want GPUs" in reason
        assert "--devices cpu" in reason
        assert "wanduet.io/gpus" in reason
    late = bench.submit()
    bench.controller.reconcile()
    assert bench.store.get(late).waits_for is not None
    bench.fleet.all_nodes.append(Node("n2", "two", declared_devices("1x24GiB"), 2**36, 8))
    bench.fits = lambda shape, demand: bool(shape.gpus)
    bench.controller.reconcile()
    assert bench.store.trouble() is None
    assert [bench.store.get(one).waits_for for one in (job, late)] == [None, None]
    assert [bench.store.get(one).status for one in (job, late)] == ["queued", "queued"]


def test_what_an_earlier_controller_said_is_said_no_more_once_it_is_untrue(bench: Bench) -> None:
    bench.fleet.all_nodes = [Node("n1", "one", (), 2**36, 8, computes=False)]
    bench.fits = lambda shape, demand: bool(shape.gpus)
    job = bench.submit()
    bench.controller.reconcile()
    assert bench.store.trouble() is not None
    assert bench.store.get(job).waits_for is not None
    bench.restart()
    bench.fleet.all_nodes = [Node("n2", "two", declared_devices("1x24GiB"), 2**36, 8)]
    bench.controller.reconcile()
    assert bench.store.trouble() is None
    assert bench.store.get(job).waits_for is None


def test_without_gpus_for_long_jobs_fail_with_what_to_do(bench: Bench) -> None:
    bench.fleet.all_nodes = [Node("n1", "one", (), 2**36, 8, computes=False)]
    job = bench.submit()
    bench.controller.reconcile()
    bench.now += 1000
    bench.controller.reconcile()
    found = bench.store.get(job)
    assert found.error is not None
    assert (found.status, found.error.code, found.waits_for) == ("failed", "does_not_fit", None)
    assert "--devices cpu" in found.error.message


def test_a_job_that_fits_no_node_says_so_while_it_waits_for_one(bench: Bench) -> None:
    huge, small, in_fp8 = bench.submit(height=9984), bench.submit(), bench.submit(height=9984, quantize="fp8")
    bench.controller.reconcile()
    assert "fits no node" in bench.store.get(huge).waits_for
    assert "with products in fp8 fits no node" in bench.store.get(in_fp8).waits_for
    assert bench.store.get(small).waits_for is None
    assert bench.store.trouble() is None
    bench.store.claim("w", 30.0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"nodes": []}, "ray status"),
        ({"draining": True}, "undrain"),
        ({"gpus": 4}, "--replica-gpus 2"),
        ({"resting": True}, "come up"),
        ({"expected": True}, None),
        ({}, None),
    ],
)
def test_each_trouble_has_its_sentence(change: dict[str, object], says: str | None) -> None:
    node = Node("n1", "one", declared_devices("2x24GiB"), 2**36, 8)
    expected = (Expected("1x24GiB", node.shape(1)),) if change.get("expected") else ()
    flags = {name: True for name in ("draining", "resting") if name in change}
    nodes = [] if "nodes" in change or expected else [replace(node, **flags)]
    found = find_trouble(nodes, (), ScaleSettings(gpus=change.get("gpus"), expected=expected))
    assert (found is None) if says is None else says in (found or "")
    assert find_trouble(nodes, (ReplicaView("r", "n1", node.shape(1)),), ScaleSettings()) is None


def test_jobs_of_another_model_bring_no_replica_and_fail_with_a_reason(tmp_path: Path) -> None:
    bench = Bench(tmp_path, model=ModelId("m", "1" * 64))
    other = bench.store.submit(NewJob("ann", "other", dict(REQUEST), model_hash="2" * 64)).job.id
    bench.controller.reconcile()
    assert bench.fleet.live == {}
    for _ in range(100):
        bench.now += 1.0
        bench.controller.tidy()
    assert bench.store.get(other).error.code == "model_changed"
    bench.submit()
    bench.controller.reconcile()
    assert list(bench.fleet.live) == ["r0"]
    bench.store.close()


def test_housekeeping_outlives_what_nobody_thought_of(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = []

    def fail_once(self: object, **workers: object) -> int:
        turns.append(1)
        if len(turns) == 1:
            raise RuntimeError("what nobody thought of")
        bench.controller.drain()
        return 0

    monkeypatch.setattr(Housekeeper, "run_once", fail_once)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    bench.controller.run_housekeeping()
    assert len(turns) == 2
