"""Plans repeatedly whether nodes should be dedicated to single stages, for the current nodes and queued jobs."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from wanduet.cluster.autoscaler import Backlog, ScaleSettings
from wanduet.cluster.fit import Fitter
from wanduet.cluster.shapes import Node, Stage
from wanduet.cluster.stages import NodeCosts, StagePlan, plan_stages
from wanduet.jobs.records import DECODE

SETTLE_SECONDS = 60.0  # how long a new choice must stay the same before it is applied: a change restarts replicas


class StagePlanner:
    """Keeps its choice for a while, so that a changing queue does not restart replicas every second."""

    def __init__(
        self, fitter: Fitter, scale: ScaleSettings, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._scale = scale
        self._monotonic = monotonic
        self._current = StagePlan(reason="together: until a choice has stood for a minute")
        self._demand: str | None = None
        self._wanted: tuple[dict[str, Stage], float] | None = None  # a new choice, and since when
        self._last: tuple[object, StagePlan] | None = None
        self._nodes: tuple[Node, ...] = ()
        self._kinds: dict[Node, list[Node]] = {}  # nodes by their kind: a node without id and name
        self._fitter = fitter
        self._costs = lru_cache(maxsize=4096)(self._find_costs)
        self._fits = lru_cache(maxsize=4096)(self._find_fit)

    def __call__(self, nodes: Sequence[Node], backlog: Sequence[Backlog], reference: str) -> StagePlan:
        """Return the current choice. `reference` is the demand to plan for while no job has waited yet."""
        here = tuple(node for node in nodes if not node.draining)
        if here != self._nodes:
            self._nodes = here
            self._kinds = defaultdict(list)
            for node in here:
                self._kinds[replace(node, id="", name="", resting=False, stage="all", lacks=frozenset())].append(node)
        demands = {one.demand.removeprefix(DECODE): one for one in backlog}
        if demands:
            self._demand = max(demands, key=lambda demand: self._work(demand, demands[demand].count))
        plan = self._find_plan(self._demand or reference, frozenset(demands), reference)
        if self._may_follow(plan, {node.id for node in here}):
            self._current, self._wanted = plan, None
        return self._current

    def _may_follow(self, plan: StagePlan, here: set[str]) -> bool:
        new, now = dict(plan.stages), dict(self._current.stages)
        if new == now or self._scale.stages != "auto" or not here.issuperset(now):
            return True
        if plan.needed & now.keys():
            return True  # a waiting job fits no other node
        if self._wanted is None or self._wanted[0] != new:
            self._wanted = (new, self._monotonic())
        return self._monotonic() - self._wanted[1] >= SETTLE_SECONDS

    def _find_plan(self, demand: str, demands: frozenset[str], reference: str) -> StagePlan:
        before = self._current.stages
        question = (self._nodes, demand, demands, reference, tuple(sorted(before.items())))
        if self._last is not None and self._last[0] == question:
            return self._last[1]
        costs: dict[str, NodeCosts] = {}
        for kind, nodes in self._kinds.items():
            same = self._costs(kind, demand)
            costs |= {node.id: replace(same, name=node.name) for node in nodes}
        wishes: dict[str, Stage] = {node.id: node.wish for node in self._nodes if node.wish is not None}
        able = [
            frozenset(node.id for kind, nodes in self._kinds.items() if self._fits(kind, one) for node in nodes)
            for one in {demand, *demands}
        ]
        needed: frozenset[str] = frozenset()
        while True:
            plan = plan_stages(costs, mode=self._scale.stages, wishes=wishes, needed=needed, before=before)
            # Else some job would fit no node, or too few nodes would be left for the minimum of replicas.
            more = frozenset().union(*(ids for ids in able if ids and ids <= plan.stages.keys()))
            more = more or self._for_minimum(plan.stages, reference)
            if not more:
                break
            needed |= more
        plan = replace(plan, needed=needed)
        self._last = (question, plan)
        return plan

    def _for_minimum(self, stages: Mapping[str, Stage], reference: str) -> frozenset[str]:
        """Return the dedicated node with most room for whole replicas, if the other nodes lack room for the minimum.

        A node that an operator labelled keeps its stage.
        """
        ordered = self._scale.stages == "apart"
        whole = 0
        room: dict[str, int] = {}
        for kind, nodes in self._kinds.items():
            replicas = self._costs(kind, reference).replicas
            for node in nodes:
                if node.id not in stages:
                    whole += replicas
                elif replicas and not (ordered and node.wish):
                    room[node.id] = replicas
        if whole >= self._scale.minimum or not room:
            return frozenset()
        return frozenset([max(room, key=lambda node_id: (room[node_id], node_id))])

    def _find_costs(self, kind: Node, demand: str) -> NodeCosts:
        return self._fitter.node_costs(kind, demand, self._scale.gpus)

    def _find_fit(self, kind: Node, demand: str) -> bool:
        return any(self._fitter.on(shape)(demand).fits for shape in kind.shapes(self._scale.gpus))

    def _work(self, demand: str, count: int) -> float:
        """Return the device-seconds of `count` jobs of a demand on the nodes where they need fewest."""
        costs = (self._costs(kind, demand) for kind in self._kinds)
        return count * min((one.whole.period() for one in costs if one.replicas), default=0.0)
