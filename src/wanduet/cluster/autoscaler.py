"""Decides which replicas there should be, from queued jobs and live replicas. Pure: no clock, database or Ray.

Replicas are chosen by the jobs' demands, not only by number: a job that fits no live replica causes one to start that
it fits, on the GPUs where it costs least; if none are free, idle replicas are drained for it. Beyond that, the age of
the queue decides: jobs that have waited longer than `upscale_seconds` cause as many replicas to start as finish the
backlog within `target_seconds`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil

from wanduet.cluster.fit import NOWHERE, Fit, FitOf, preference
from wanduet.cluster.shapes import Expected, Node, ReplicaView, Shape
from wanduet.jobs.records import loras_tag


@dataclass(frozen=True, slots=True)
class ScaleSettings:
    """Limits and delays of the autoscaler. Times in seconds.

    `minimum` 0 lets the fleet shrink to nothing. `gpus` is the number of GPUs of each replica (None: the plan decides).
    `expected` lists nodes that Ray's own autoscaler can add.
    """

    minimum: int = 1
    maximum: int = 64
    upscale_seconds: float = 10.0
    target_seconds: float = 60.0
    idle_seconds: float = 300.0
    gpus: int | None = None
    expected: tuple[Expected, ...] = ()


@dataclass(frozen=True, slots=True)
class Backlog:
    """Queued jobs of one demand, of all owners; `waited` is the age of the oldest in seconds."""

    demand: str
    count: int
    waited: float


@dataclass(frozen=True, slots=True)
class Start:
    """A replica to start on a node; `node` None lets Ray add a node with the label."""

    node: str | None
    shape: Shape
    label: str | None = None


@dataclass(frozen=True, slots=True)
class Changes:
    """Changes to make now.

    `drain`: ids of replicas that shall take no more jobs and end. `unfit`: demands that fit no node, not even an empty
    one, or no node that has their LoRA.
    """

    start: tuple[Start, ...] = ()
    drain: tuple[str, ...] = ()
    unfit: tuple[str, ...] = ()


def decide(
    nodes: Sequence[Node],
    replicas: Iterable[ReplicaView],
    backlog: Iterable[Backlog],
    fits: Callable[[Shape], FitOf],
    settings: ScaleSettings,
    reference: str,
) -> Changes:
    """Compare the fleet with what the backlog needs, and return the changes.

    `reference` is the demand for which replicas start while no job waits, to keep up the minimum.
    """
    fleet = _Fleet(nodes, tuple(replicas), fits, settings)
    fleet.leave_draining_nodes()
    waiting = sorted(backlog, key=lambda one: -one.waited)
    for one in waiting:
        fleet.serve(one)
    while len(fleet.active) < settings.minimum and fleet.start_for(reference):
        pass
    fleet.shrink(waiting)
    return Changes(tuple(fleet.started), tuple(fleet.drained), tuple(fleet.unfit))


class _Fleet:
    """The fleet as it will be after the changes decided so far."""

    def __init__(
        self,
        nodes: Sequence[Node],
        replicas: tuple[ReplicaView, ...],
        fits: Callable[[Shape], FitOf],
        settings: ScaleSettings,
    ) -> None:
        self.nodes = {node.id: node for node in nodes}
        self.replicas = replicas
        self.settings = settings
        self.active = [replica for replica in replicas if replica.state != "draining"]
        self.started: list[Start] = []
        self.drained: list[str] = []
        self.unfit: list[str] = []
        self._fits = fits
        self._free = {node.id: 0 if node.resting else max(1, len(node.devices)) for node in nodes}
        for replica in replicas:
            if replica.node in self._free:
                self._free[replica.node] -= max(1, replica.shape.gpus)

    def fit(self, demand: str, shape: Shape, node: Node | None) -> Fit:
        """Return whether and how fast a demand runs on a shape; `node`: the one that it is on, if that is known."""
        lacks = node is not None and loras_tag(demand) in node.lacks
        return NOWHERE if lacks else self._fits(shape)(demand)

    def fit_on(self, demand: str, replica: ReplicaView) -> Fit:
        """Return whether and how fast a demand runs on a replica."""
        return self.fit(demand, replica.shape, self.nodes.get(replica.node or ""))

    def leave_draining_nodes(self) -> None:
        """Drain replicas on nodes that are draining."""
        for replica in tuple(self.active):
            node = self.nodes.get(replica.node or "")
            if node is not None and node.draining:
                self._drain(replica)

    @property
    def full(self) -> bool:
        """Whether the maximum is reached."""
        return len(self.active) >= self.settings.maximum

    def serve(self, one: Backlog) -> None:
        """Start replicas for a demand that has waited too long, or that fits no replica."""
        able = [replica for replica in self.active if self.fit_on(one.demand, replica).fits]
        if not able:
            started = self.start_for(one.demand)
            if not started and one.demand not in self.unfit and one.waited >= self.settings.upscale_seconds:
                self._make_room(one.demand)
            return
        if one.waited < self.settings.upscale_seconds:
            return
        seconds = min(self.fit_on(one.demand, replica).seconds for replica in able)
        wanted = min(one.count, ceil(one.count * seconds / self.settings.target_seconds))
        coming = sum(replica.state == "starting" or not replica.jobs for replica in able)
        for _ in range(wanted - coming):
            if not self.start_for(one.demand):
                return

    def start_for(self, demand: str) -> bool:
        """Start the replica on which a demand costs the fewest device-seconds; return False if there is no place."""
        best: tuple[int, int, int] | None = None
        choice: Start | None = None
        anywhere = False
        for node, shape in self._places():
            fit = self.fit(demand, shape, node)
            anywhere = anywhere or fit.fits
            if not fit.fits or self._free[node.id] < max(1, shape.gpus):
                continue
            cost = preference(shape, fit)
            if best is None or cost < best:
                best, choice = cost, Start(node.id, shape)
        # Nodes that are added have no other LoRA than those that are here.
        expected = (
            () if any(loras_tag(demand) in node.lacks for node in self.nodes.values()) else self.settings.expected
        )
        able = [(one, fit) for one in expected if (fit := self.fit(demand, one.shape, None)).fits]
        if choice is None and able:
            new, _ = min(able, key=lambda one: preference(one[0].shape, one[1]))
            choice, anywhere = Start(None, new.shape, new.label), True
        if choice is None or self.full:
            anywhere = anywhere or any(self.fit_on(demand, replica).fits for replica in self.active)
            if not anywhere and self.nodes and demand not in self.unfit:
                self.unfit.append(demand)
            return False
        self._add(choice)
        return True

    def shrink(self, waiting: Sequence[Backlog]) -> None:
        """Drain replicas that have been idle for long and that no waiting job needs."""
        idle = [replica for replica in self.active if replica.idle_seconds >= self.settings.idle_seconds]
        for replica in sorted(idle, key=lambda one: -one.idle_seconds):
            if len(self.active) > self.settings.minimum and not any(
                self.fit_on(one.demand, replica).fits for one in waiting
            ):
                self._drain(replica)

    def _places(self) -> Iterable[tuple[Node, Shape]]:
        for node in self.nodes.values():
            if not node.draining:  # a paused node counts, though nothing is free there: its jobs do fit somewhere
                yield from ((node, shape) for shape in node.shapes(self.settings.gpus))

    def _make_room(self, demand: str) -> None:
        """Drain replicas where the demand would fit and where that loses least; none if enough are draining already."""
        if self.full:
            idle = [replica for replica in self.active if not replica.jobs and replica.state == "ready"]
            if idle and not any(replica.state == "draining" for replica in self.replicas):
                self._drain(max(idle, key=lambda one: one.idle_seconds))
            return
        best: tuple[tuple[int, int], list[ReplicaView]] | None = None
        for node, shape in self._places():
            if not self.fit(demand, shape, node).fits:
                continue
            here = [replica for replica in self.replicas if replica.node == node.id]
            leaving = [one for one in here if one.state == "draining" or one.id in self.drained]
            coming = self._free[node.id] + sum(max(1, one.shape.gpus) for one in leaving)
            staying = [one for one in here if one not in leaving]
            staying.sort(key=lambda one: (len(one.jobs), -one.idle_seconds))
            victims: list[ReplicaView] = []
            while coming < max(1, shape.gpus) and staying:
                victims.append(staying.pop(0))
                coming += max(1, victims[-1].shape.gpus)
            loss = (sum(len(one.jobs) for one in victims), len(victims))
            if coming >= max(1, shape.gpus) and (best is None or loss < best[0]):
                best = (loss, victims)
        for replica in best[1] if best is not None else ():
            self._drain(replica)

    def _add(self, start: Start) -> None:
        self.started.append(start)
        if start.node is not None:
            self._free[start.node] -= max(1, start.shape.gpus)
        self.active.append(ReplicaView(f"new-{len(self.started)}", start.node, start.shape))

    def _drain(self, replica: ReplicaView) -> None:
        self.active.remove(replica)
        if replica.id not in self.drained:
            self.drained.append(replica.id)
