"""A simulated fleet and clock around the cluster's own controller, scheduler and store."""

import heapq
import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wanduet.cluster.autoscaler import ScaleSettings, Start
from wanduet.cluster.controller import Controller
from wanduet.cluster.fit import Fitter
from wanduet.cluster.settings import ClusterSettings
from wanduet.cluster.shapes import Gone, Node, ReplicaView, declared_devices
from wanduet.cluster.store import ClusterStore
from wanduet.config import EngineConfig
from wanduet.jobs.files import JobFiles
from wanduet.jobs.records import Lease, NewJob, StaleLeaseError, demand_of
from wanduet.jobs.runner import RunnerSettings
from wanduet.jobs.worker import WorkerSettings

MODEL = "random:14b"
# Share of the jobs, size, frames, steps, guidance: seconds, half an hour, and hours on the large cards only.
MIX = {
    "small": (0.6, (480, 832), 49, 4, 1.0),
    "middle": (0.3, (480, 832), 81, 30, 5.0),
    "big": (0.1, (1080, 1920), 161, 4, 1.0),
}
LOAD = 0.8  # of what the whole fleet could do
TICK, START, OUTAGE, CHECKPOINT = 10.0, 60.0, 600.0, 15.0  # seconds: controller's turn, replica's start, node, save
FAILURES = 6  # of nodes in a run, at least
ZOMBIES = 0.3  # of killed workers wake up later and try to commit
EPOCH = 1.7e9


@dataclass
class Replica:
    view: ReplicaView
    alive_since: float
    lease: Lease | None = None
    began: float = 0.0
    polls: bool = False  # whether a look at the queue is on its way
    busy: float = 0.0
    idle_since: float = 0.0


@dataclass
class Simulation:
    """Events by time; also the fleet that the controller sees."""

    size: int
    jobs: int
    folder: Path
    fitter: Fitter
    draw: random.Random = field(default_factory=lambda: random.Random(7))

    def __post_init__(self) -> None:
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.counter = 0
        self.store = ClusterStore(JobFiles(self.folder), clock=lambda: EPOCH + self.now)
        self.nodes_up = self._nodes()
        self.replicas: dict[str, Replica] = {}
        self.gone: list[Gone] = []
        self.done_part: dict[str, float] = defaultdict(float)  # of a job, kept by its checkpoints
        self.kind: dict[str, str] = {}
        self.waits: dict[str, list[float]] = defaultdict(list)
        self.owner_waits: dict[str, list[float]] = defaultdict(list)
        self.counts: Counter[str] = Counter()
        self.claim_seconds: list[float] = []
        self.turn_seconds: list[float] = []
        self.gpu_seconds = {"up": 0.0, "reserved": 0.0, "busy": 0.0}
        worker = WorkerSettings(EngineConfig(model=MODEL, data_dir=self.folder), RunnerSettings(lease_seconds=30.0))
        # A tenth of the fleet stays up; the rest comes and goes with the queue.
        scale = ScaleSettings(minimum=max(1, self.size // 10), maximum=self.size, idle_seconds=300.0)
        self.controller = Controller(
            self.store, self, self.fitter, ClusterSettings(worker, scale=scale), monotonic=lambda: self.now
        )

    def _nodes(self) -> dict[str, Node]:
        """Two thirds of the GPUs in pairs of 24 GiB, a third in machines of eight 80 GiB cards (or one)."""
        large = max(1, self.size // 3)
        found: dict[str, Node] = {}
        for gpus, total, most in (("80GiB", large, 8), ("24GiB", self.size - large, 2)):
            while total > 0:
                count = min(most, total)
                name = f"{gpus}-{len(found)}"
                found[name] = Node(name, name, declared_devices(f"{count}x{gpus}"), count * 2**36, 16 * count)
                total -= count
        return found

    # The controller's view: the protocol `Fleet`.

    def nodes(self, drained: frozenset[str]) -> tuple[Node, ...]:
        return tuple(self.nodes_up.values())

    def start(self, start: Start) -> None:
        name = f"r{self.counts['replicas_started']}"
        self.counts["replicas_started"] += 1
        self.replicas[name] = Replica(ReplicaView(name, start.node, start.shape), self.now)
        self.at(START * self.draw.uniform(0.7, 1.5), lambda: self.ready(name))

    def drain(self, replica: str) -> None:
        one = self.replicas[replica]
        if one.lease is None:
            self.leave(replica, lost=False)
        else:
            one.view = replace(one.view, state="draining")

    def poll(self) -> tuple[tuple[ReplicaView, ...], tuple[Gone, ...]]:
        gone, self.gone = tuple(self.gone), []
        return tuple(self.view(one) for one in self.replicas.values()), gone

    def view(self, one: Replica) -> ReplicaView:
        if one.lease is not None:
            return replace(one.view, jobs=(one.lease.job.id,), idle_seconds=0.0)
        idle = self.now - one.idle_since if one.view.state == "ready" else 0.0
        return replace(one.view, jobs=(), idle_seconds=idle)

    def close(self) -> None: ...

    # Events.

    def at(self, delay: float, event: Callable[[], None]) -> None:
        self.counter += 1
        heapq.heappush(self.events, (self.now + delay, self.counter, event))

    def ready(self, name: str) -> None:
        if name in self.replicas:
            one = self.replicas[name]
            one.view = replace(one.view, state="ready", worker=f"elsewhere.{name}")
            one.idle_since = self.now
            self.look(name)

    def arrive(self) -> None:
        kind = self.draw.choices(list(MIX), [share for share, *_ in MIX.values()])[0]
        _, size, frames, steps, scale = MIX[kind]
        request = {
            "prompt": "x", "height": size[0], "width": size[1], "num_frames": frames,
            "num_inference_steps": steps, "guidance_scale": scale,
        }  # fmt: skip
        owner = "flood" if self.draw.random() < 0.6 else f"key{self.draw.randrange(4)}"
        job = self.store.submit(NewJob(owner, MODEL, request)).job
        self.kind[job.id] = kind
        fitting = [
            name
            for name, one in self.replicas.items()
            if one.view.state == "ready" and one.lease is None and not one.polls
            and self.fitter.on(one.view.shape)(demand_of(job.request)).fits
        ]  # fmt: skip
        if fitting:  # all of them poll; the one that looks first gets it
            self.wake(self.draw.choice(fitting), 0.25 / len(fitting))

    def wake(self, name: str, within: float) -> None:
        self.replicas[name].polls = True
        self.at(self.draw.uniform(0, within), lambda: self.look(name))

    def look(self, name: str) -> None:
        """A replica with nothing to do asks the store, as `Runner` does."""
        one = self.replicas.get(name)
        if one is None:
            return
        one.polls = False
        if one.lease is not None or one.view.state != "ready":
            return
        self.store._fit_of, self.store._devices = self.fitter.on(one.view.shape), one.view.shape.gpus
        began = time.perf_counter()
        lease = self.store.claim(f"elsewhere.{name}", 1e9)
        self.claim_seconds.append(time.perf_counter() - began)
        if lease is None:
            return
        fit = self.fitter.on(one.view.shape)(demand_of(lease.job.request))
        self.counts["misfits"] += not fit.fits
        if lease.job.attempts == 1:
            wait = self.store._clock() - lease.job.created_at
            self.waits[self.kind[lease.job.id]].append(wait)
            self.owner_waits["flood" if lease.job.owner == "flood" else "others"].append(wait)
        one.lease, one.began = lease, self.now
        seconds = max(1.0, fit.seconds) * self.draw.uniform(0.9, 1.2) * (1 - self.done_part[lease.job.id])
        self.at(seconds, lambda: self.finish(name, lease, seconds))

    def finish(self, name: str, lease: Lease, seconds: float) -> None:
        one = self.replicas.get(name)
        if one is None or one.lease is not lease:
            return
        self.gpu_seconds["busy"] += seconds * one.view.shape.gpus
        self.store.complete(lease, [], {"timings": {"total_s": seconds}})
        self.counts["completions"] += 1
        one.lease, one.idle_since = None, self.now
        if one.view.state == "draining":
            self.leave(name, lost=False)
        else:
            self.look(name)

    def leave(self, name: str, *, lost: bool) -> None:
        one = self.replicas.pop(name)
        self.gpu_seconds["reserved"] += (self.now - one.alive_since) * one.view.shape.gpus
        self.gone.append(Gone(name, one.view.node, one.view.worker, lost))
        if one.lease is None:
            return
        lease, ran = one.lease, self.now - one.began
        self.gpu_seconds["busy"] += ran * one.view.shape.gpus
        whole = max(1.0, self.fitter.on(one.view.shape)(demand_of(lease.job.request)).seconds)
        kept = max(0.0, ran - self.draw.uniform(0, CHECKPOINT))  # the rest is done again
        self.counts["seconds_redone"] += int(ran - kept)
        self.done_part[lease.job.id] = min(0.95, self.done_part[lease.job.id] + kept / whole)
        if self.draw.random() < ZOMBIES:
            self.at(self.draw.uniform(20, 200), lambda: self.wake_up_late(lease))

    def wake_up_late(self, lease: Lease) -> None:
        """A worker that everybody takes for dead tries to commit."""
        try:
            self.store.complete(lease, [])
            self.counts["stale_commits_taken"] += 1
        except StaleLeaseError:
            self.counts["stale_commits_refused"] += 1

    def fail_node(self) -> None:
        if not self.nodes_up:
            return
        name = self.draw.choice(list(self.nodes_up))
        node = self.nodes_up.pop(name)
        self.counts["node_failures"] += 1
        for replica in [key for key, one in self.replicas.items() if one.view.node == name]:
            self.leave(replica, lost=True)
        self.at(OUTAGE, lambda: self.nodes_up.__setitem__(name, node))

    def reconcile(self) -> None:
        began = time.perf_counter()
        self.controller.reconcile()
        self.controller.tidy()
        self.turn_seconds.append(time.perf_counter() - began)
        self.gpu_seconds["up"] += TICK * sum(len(node.devices) for node in self.nodes_up.values())
        for name, one in tuple(self.replicas.items()):  # what fits an idle replica was put back, or is not new
            if one.view.state == "ready" and one.lease is None and not one.polls and self.queued():
                self.wake(name, 0.25)
        if self.counts["completions"] < self.jobs:
            self.at(TICK, self.reconcile)

    def queued(self) -> bool:
        return self.counts["completions"] + sum(o.lease is not None for o in self.replicas.values()) < self.counts["in"]

    # A run.

    def capacity(self) -> float:
        """Jobs a second of the whole fleet, as if each job ran where it is fastest a device-second."""
        small, large = (Node("", "", declared_devices(f"1x{gpus}"), 2**36, 16).shape(1) for gpus in ("24GiB", "80GiB"))
        cards = Counter("80GiB" in node.id for node in self.nodes_up.values() for _ in node.devices)
        work = {True: 0.0, False: 0.0}
        for share, size, frames, steps, scale in MIX.values():
            text = f"{size[0]}x{size[1]}x{frames}/{steps}/{1 + (scale > 1)}/1"
            on_small, on_large = self.fitter.on(small)(text), self.fitter.on(large)(text)
            if on_small.fits and cards[False]:
                work[False] += share * on_small.seconds
            else:
                work[True] += share * on_large.seconds
        rates = [cards[large_card] / seconds for large_card, seconds in work.items() if seconds]
        return min(rates)

    def run(self) -> dict[str, Any]:
        rate = LOAD * self.capacity()
        moment = 0.0
        while self.counts["in"] < self.jobs:  # bursts: three times the rate for a third of the time, else nothing
            period = 20 * 1 / rate * max(1, self.size) ** 0.5
            moment += self.draw.expovariate(3 * rate)
            if (moment // (period / 3)) % 3:
                moment = (moment // period + 1) * period
            self.counts["in"] += 1
            heapq.heappush(self.events, (moment, -self.jobs + self.counts["in"], self.arrive))
        for _ in range(FAILURES):
            self.at(self.draw.uniform(0.1, 0.9) * moment, self.fail_node)
        self.at(0.0, self.reconcile)
        began = time.perf_counter()
        while self.events and self.counts["completions"] < self.jobs:
            self.now, _, event = heapq.heappop(self.events)
            event()
        wall = time.perf_counter() - began
        for one in self.replicas.values():
            self.gpu_seconds["reserved"] += (self.now - one.alive_since) * one.view.shape.gpus
        return self.result(wall)

    def result(self, wall: float) -> dict[str, Any]:
        by_status = self.store.statistics().by_status
        completed, counted = by_status.get("completed", 0), self.store.statistics().stages["total_s"][1]
        up = self.gpu_seconds["up"]
        row: dict[str, Any] = {
            "replicas": self.size,
            "jobs": self.jobs,
            "simulated_hours": round(self.now / 3600, 1),
            "lost": self.jobs - completed,
            "duplicated": counted - completed,
            "misfits": self.counts["misfits"],
            "node_failures": self.counts["node_failures"],
            "stale_commits_refused": self.counts["stale_commits_refused"],
            "stale_commits_taken": self.counts["stale_commits_taken"],
            "gpu_seconds_redone": self.counts["seconds_redone"],
            "utilisation_of_all_gpus": round(self.gpu_seconds["busy"] / up, 3),
            "utilisation_of_reserved_gpus": round(self.gpu_seconds["busy"] / self.gpu_seconds["reserved"], 3),
        }
        for kind in MIX:
            row |= {f"wait_{kind}_{name}_s": value for name, value in quantiles(self.waits[kind]).items()}
        for owner, waits in sorted(self.owner_waits.items()):
            row[f"wait_{owner}_p50_s"] = quantiles(waits)["p50"]
        row["claim_ms"] = round(1e3 * statistics.mean(self.claim_seconds), 2)
        row["decisions_a_second"] = round(len(self.claim_seconds) / sum(self.claim_seconds))
        row["controller_turn_ms_p50"] = round(1e3 * statistics.median(self.turn_seconds), 1)
        row["controller_turn_ms_max"] = round(1e3 * max(self.turn_seconds), 1)
        row["wall_s"] = round(wall, 1)
        return row


def quantiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {"p50": 0.0, "p99": 0.0}
    ordered = sorted(values)
    return {name: round(ordered[min(len(ordered) - 1, int(part * len(ordered)))], 1)
            for name, part in (("p50", 0.5), ("p99", 0.99))}  # fmt: skip
