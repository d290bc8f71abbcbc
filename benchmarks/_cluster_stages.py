"""A simulated fleet whose stages may live apart, around the cluster's own controller, planner, scheduler and store.

Only the making of videos, the network and the clock are simulated. A replica holds two jobs: one on its GPU, and the next,
whose text it encodes meanwhile on the node's cores, which all replicas of the node share.
"""

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from _cluster_fleet import CHECKPOINT, EPOCH, OUTAGE, START, ZOMBIES

from wanduet.cluster.autoscaler import ScaleSettings, Start
from wanduet.cluster.controller import Controller
from wanduet.cluster.encoder import AHEAD, TOGETHER
from wanduet.cluster.fit import Fitter
from wanduet.cluster.handover import DECODER, Handover, TakeBack
from wanduet.cluster.settings import ClusterSettings
from wanduet.cluster.shapes import Gone, Node, ReplicaView, Shape
from wanduet.cluster.store import ClusterStore
from wanduet.config import GIB, EngineConfig
from wanduet.family.spec import ModelSpec
from wanduet.jobs.files import JobFiles
from wanduet.jobs.records import DECODE, Lease, NewJob, StaleLeaseError, demand_of
from wanduet.jobs.worker import WorkerSettings
from wanduet.planning.cost import MOST_CORES, encode_seconds
from wanduet.planning.hardware import DeviceInfo
from wanduet.planning.text import plan_text

TICK, POLL = 5.0, 0.25  # seconds: controller's turn, a look at the queue
HELD = 2  # jobs of a replica at a time
CARDS = {"H100": ((9, 0), 132, 80), "4090": ((8, 9), 128, 24), "P40": ((6, 1), 30, 24)}  # generation, SMs, GiB


def node(name: str, card: str | None, count: int, cores: int, **options: Any) -> Node:
    """A machine with so many cards of a kind (None: none), and 16 GiB for each core."""
    devices: tuple[DeviceInfo, ...] = ()
    if card is not None:
        generation, multiprocessors, size = CARDS[card]
        devices = tuple(
            DeviceInfo(f"cuda:{index}", card, size * GIB, (size - 1) * GIB, generation, multiprocessors)
            for index in range(count)
        )
    return Node(name, name, devices, cores * 16 * GIB, cores, computes=False, **options)


@dataclass(eq=False)
class Held:
    """A job in a replica's hands."""

    lease: Lease
    ready: bool = False  # its text, or its latents, are there
    began: float = 0.0


@dataclass
class Member:
    """A replica, decoder or encoder."""

    view: ReplicaView
    handover: Handover
    held: list[Held] = field(default_factory=list)
    works: bool = False  # the GPU, or the encoder
    texts: list[Held] = field(default_factory=list)  # that its own encoder has still to do
    polls: bool = False


@dataclass
class Stages:
    """One run; also the fleet that the controller sees. `failures`: nodes that fail for ten minutes each."""

    machines: list[Node]
    request: dict[str, Any]
    jobs: int
    mode: str
    folder: Path
    fitter: Fitter
    spec: ModelSpec
    failures: int = 0
    draw: random.Random = field(default_factory=lambda: random.Random(11))

    def __post_init__(self) -> None:
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.store = ClusterStore(JobFiles(self.folder), clock=lambda: EPOCH + self.now)
        self.up = {one.id: one for one in self.machines}
        self.members: dict[str, Member] = {}
        self.gone: list[Gone] = []
        self.cores_free: dict[str, float] = {}
        self.encoded: set[str] = set()
        self.encoding: set[str] = set()
        self.latents: set[str] = set()
        self.part: dict[str, float] = {}  # of a denoise, kept by its checkpoints
        self.counts: Counter[str] = Counter()
        self.done_at: list[float] = []
        self.verdict = ""
        self.predicted = 0.0
        config = EngineConfig(data_dir=self.folder)
        text = plan_text(self.spec, config)
        self.encode = {
            False: encode_seconds(self.spec, text.dtype, text.residency),
            True: encode_seconds(self.spec, text.dtype, "resident"),
        }
        self.controller = Controller(
            self.store,
            self,
            self.fitter,
            ClusterSettings(
                WorkerSettings(config), scale=ScaleSettings(minimum=1, maximum=999, stages=self.mode)  # type: ignore[arg-type]
            ),
            monotonic=lambda: self.now,
        )  # fmt: skip

    # The controller's view: the protocol `Fleet`.

    def nodes(self, drained: frozenset[str]) -> tuple[Node, ...]:
        return tuple(self.up.values())

    def start(self, start: Start) -> None:
        name = f"r{self.counts['started']}"
        self.counts["started"] += 1
        handover = Handover(lambda shape, demand: True, TakeBack(monotonic=lambda: self.now))
        self.members[name] = Member(ReplicaView(name, start.node, start.shape), handover)
        self.at(START * self.draw.uniform(0.7, 1.5), lambda: self.ready(name))

    def drain(self, replica: str) -> None:
        """What it holds goes back with a checkpoint, after the step."""
        one = self.members[replica]
        for held in one.held:
            self.keep_part(one, held)
            self.store.release(held.lease)
        one.held.clear()
        self.leave(replica, lost=False)

    def poll(self) -> tuple[tuple[ReplicaView, ...], tuple[Gone, ...]]:
        gone, self.gone = tuple(self.gone), []
        views = (replace(one.view, jobs=tuple(h.lease.job.id for h in one.held)) for one in self.members.values())
        return tuple(views), gone

    def close(self) -> None: ...

    # Events.

    def at(self, delay: float, event: Callable[[], None]) -> None:
        self.counts["events"] += 1
        heapq.heappush(self.events, (self.now + delay, self.counts["events"], event))

    def ready(self, name: str) -> None:
        if name in self.members:
            self.members[name].view = replace(self.members[name].view, state="ready", worker=f"elsewhere.{name}")
            self.look(name)

    def wake(self, name: str) -> None:
        one = self.members[name]
        if not one.polls:
            one.polls = True
            self.at(self.draw.uniform(0, POLL), lambda: self.look(name))

    def look(self, name: str) -> None:
        """Take what there is room for, as `Runner` does; an encoder looks at what waits."""
        one = self.members.get(name)
        if one is None or one.view.state != "ready":
            return
        one.polls = False
        if one.view.shape.stage == "encode":
            self.encode_ahead(name, one)
            return
        while len(one.held) < HELD:
            fit_of = self.fitter.on(one.view.shape)
            self.store._fit_of, self.store._devices = fit_of, one.view.shape.gpus
            self.store._handover = one.handover if one.view.shape.stage == "all" else None
            lease = self.store.claim(f"elsewhere.{name}", 1e9, alone=not one.held)
            if lease is None:
                break
            held = Held(lease)
            one.held.append(held)
            self.prepare(name, one, held)
        self.advance(name)

    def prepare(self, name: str, one: Member, held: Held) -> None:
        """Its text, unless an encoder was quicker or only the decode is left."""
        job_id = held.lease.job.id
        if job_id in self.latents or job_id in self.encoded:
            self.counts["texts_found"] += job_id not in self.latents
            held.ready = True
            return
        one.texts.append(held)
        if len(one.texts) == 1:
            self.encode_next(name, one)

    def encode_next(self, name: str, one: Member) -> None:
        """The replica's own encoder: one prompt after the other; its weights come first, then it needs the node's cores."""
        read, work = self.encode[False]
        where, held = one.view.node or "", one.texts[0]

        def compute() -> None:
            end = max(self.now, self.cores_free.get(where, 0.0))
            end += self.vary(work / min(one.view.shape.cpu_count, MOST_CORES))
            self.cores_free[where] = end
            self.at(end - self.now, finish)

        def finish() -> None:
            self.encoded.add(held.lease.job.id)
            held.ready = True
            one.texts.pop(0)
            if one.texts:
                self.encode_next(name, one)
            self.advance(name)

        self.at(read, compute)

    def encode_ahead(self, name: str, one: Member) -> None:
        if one.works:
            return
        waiting = [job.id for job in self.store.prompts_ahead(AHEAD)]
        new = [job_id for job_id in waiting if job_id not in self.encoded | self.encoding][:TOGETHER]
        if not new:
            return
        one.works = True
        self.encoding.update(new)
        read, work = self.encode[True]
        seconds = read + self.vary(len(new) * work / min(one.view.shape.cpu_count, MOST_CORES))

        def finish() -> None:
            self.encoding.difference_update(new)
            if name in self.members:
                self.encoded.update(new)
                one.works = False
                self.look(name)

        self.at(seconds, finish)

    def advance(self, name: str) -> None:
        """Let the GPU do the first job whose text is there."""
        one = self.members.get(name)
        if one is None or one.works:
            return
        held = next((held for held in one.held if held.ready), None)
        if held is None:
            return
        one.works, held.began = True, self.now
        if held.lease.job.id in self.latents:
            self.decode(name, one, held)
            return
        seconds = self.vary(self.costs(one, held).denoise) * (1 - self.part.get(held.lease.job.id, 0.0))
        self.at(seconds, lambda: self.denoised(name, held))

    def denoised(self, name: str, held: Held) -> None:
        one = self.members.get(name)
        if one is None or held not in one.held:
            return
        job = held.lease.job
        self.latents.add(job.id)
        self.counts["denoised"] += 1
        self.store._handover = one.handover
        if self.store.has_decoder(job):
            self.store.release(held.lease, DECODE + demand_of(job.request))
            self.counts["left"] += 1
            for other, member in self.members.items():
                if member.view.shape.name.endswith(DECODER) and len(member.held) < HELD:
                    self.wake(other)
            self.let_go(name, one, held)
        else:
            self.decode(name, one, held)

    def decode(self, name: str, one: Member, held: Held) -> None:
        self.at(self.vary(self.costs(one, held).decode), lambda: self.finish(name, held))

    def finish(self, name: str, held: Held) -> None:
        one = self.members.get(name)
        if one is None or held not in one.held:
            return
        self.store.complete(held.lease, [], {"timings": {"total_s": 1.0}})
        self.counts["completions"] += 1
        self.done_at.append(self.now)
        self.let_go(name, one, held)

    def let_go(self, name: str, one: Member, held: Held) -> None:
        one.held.remove(held)
        one.works = False
        self.advance(name)
        self.look(name)

    def leave(self, name: str, *, lost: bool) -> None:
        one = self.members.pop(name)
        self.gone.append(Gone(name, one.view.node, one.view.worker, lost))
        for held in one.held:
            self.keep_part(one, held)
            if self.draw.random() < ZOMBIES:
                self.at(self.draw.uniform(20, 200), lambda lease=held.lease: self.wake_up_late(lease))

    def keep_part(self, one: Member, held: Held) -> None:
        job_id = held.lease.job.id
        if held.began and job_id not in self.latents:
            ran = max(0.0, self.now - held.began - self.draw.uniform(0, CHECKPOINT))
            self.part[job_id] = min(0.95, self.part.get(job_id, 0.0) + ran / self.costs(one, held).denoise)

    def wake_up_late(self, lease: Lease) -> None:
        try:
            self.store.complete(lease, [])
            self.counts["stale_commits_taken"] += 1
        except StaleLeaseError:
            self.counts["stale_commits_refused"] += 1

    def fail_node(self) -> None:
        if not self.up:
            return
        name = self.draw.choice(list(self.up))
        failed = self.up.pop(name)
        for member in [key for key, one in self.members.items() if one.view.node == name]:
            self.leave(member, lost=True)
        self.at(OUTAGE, lambda: self.up.__setitem__(name, failed))

    def reconcile(self) -> None:
        self.controller.reconcile()
        self.controller.tidy()
        for name, one in tuple(self.members.items()):
            if one.view.state == "ready" and len(one.held) < HELD:
                self.wake(name)
        told = self.store.stages()
        self.verdict, self.predicted = told.get("reason", ""), told.get("jobs_an_hour", 0.0)
        if self.counts["completions"] < self.jobs:
            self.at(TICK, self.reconcile)

    # Sums.

    def costs(self, one: Member, held: Held) -> Any:
        demand = demand_of(held.lease.job.request)
        shape: Shape = one.view.shape
        fit = self.fitter.on(shape)(DECODE + demand if shape.stage == "decode" else demand)
        self.counts["misfits"] += not fit.fits
        return fit.costs

    def vary(self, seconds: float) -> float:
        """Within a tenth of what was predicted."""
        return seconds * self.draw.uniform(0.9, 1.1)

    def run(self) -> dict[str, Any]:
        for _ in range(self.jobs):
            self.store.submit(NewJob("ann", "m", self.request))
        expected = 3600 * self.jobs / max(1.0, self._together())
        for _ in range(self.failures):
            self.at(self.draw.uniform(0.1, 0.9) * expected, self.fail_node)
        self.at(0.0, self.reconcile)
        while self.events and self.counts["completions"] < self.jobs:
            self.now, _, event = heapq.heappop(self.events)
            event()
        first, last = self.done_at[self.jobs // 4], self.done_at[self.jobs * 9 // 10]
        done = self.jobs * 9 // 10 - self.jobs // 4
        statistics = self.store.statistics()
        completed = statistics.by_status.get("completed", 0)
        return {
            "stages": self.mode,
            "jobs": self.jobs,
            "predicted_jobs_an_hour": self.predicted,
            "jobs_an_hour": round(3600 * done / (last - first), 1),
            "decodes_left": round(self.counts["left"] / max(1, self.counts["denoised"]), 3),
            "lost": self.jobs - completed,
            "duplicated": statistics.stages["total_s"][1] - completed,
            "denoised_again": self.counts["denoised"] - self.jobs,
            "misfits": self.counts["misfits"],
            "node_failures": self.failures,
            "stale_commits_refused": self.counts["stale_commits_refused"],
            "stale_commits_taken": self.counts["stale_commits_taken"],
            "verdict": self.verdict,
        }

    def _together(self) -> float:
        from wanduet.cluster.stages import plan_stages

        costs = {one.id: self.fitter.node_costs(one, demand_of(self.request)) for one in self.machines}
        return 3600 * plan_stages(costs, mode="together").together
