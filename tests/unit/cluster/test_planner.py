"""The choice of stages over time: for the jobs that wait, on the nodes that are there, without moving at every look."""

from types import SimpleNamespace

from wanduet.cluster.autoscaler import Backlog, ScaleSettings
from wanduet.cluster.fit import Fit
from wanduet.cluster.planner import SETTLE_SECONDS, StagePlanner
from wanduet.cluster.shapes import Node, Shape, declared_devices
from wanduet.cluster.stages import Costs, NodeCosts, StagePlan

# Seconds by kind of job and of card: few steps make the decode half of the work, many steps make it nothing.
SECONDS = {
    ("few", "80GiB"): Costs(2.0, 2.5), ("few", "11GiB"): Costs(60.0, 8.0),
    ("many", "80GiB"): Costs(60.0, 2.5), ("many", "11GiB"): Costs(600.0, 25.0),
    ("tiny", "11GiB"): Costs(1.0, 1.0),
}  # fmt: skip


def kind(shape: Shape | Node) -> str:
    return f"{shape.devices[0].total_bytes // 2**30}GiB"


class Fitter:
    def on(self, shape: Shape) -> object:
        return lambda demand: Fit((demand, kind(shape)) in SECONDS)

    def node_costs(self, node: Node, demand: str, gpus: int | None) -> NodeCosts:
        whole = SECONDS.get((demand, kind(node)))
        if whole is None:
            return NodeCosts(node.name, 0, Costs(9e9, 9e9))
        return NodeCosts(node.name, len(node.devices), whole, len(node.devices), whole.decode)


class Bench:
    def __init__(self, **scale: object) -> None:
        self.now = SimpleNamespace(seconds=0.0)
        self.planner = StagePlanner(Fitter(), ScaleSettings(**scale), monotonic=lambda: self.now.seconds)
        self.nodes = [node("new", "2x80GiB"), node("old", "4x11GiB")]

    def look(self, *demands: str, after: float = 0.0) -> StagePlan:
        self.now.seconds += after
        return self.planner(self.nodes, [Backlog(demand, 5, 1.0) for demand in demands], "many")


def node(name: str, gpus: str, **options: object) -> Node:
    return Node(name, name, declared_devices(gpus), 2**36, 8, **options)


def test_a_choice_is_followed_when_it_has_stood_for_a_while() -> None:
    bench = Bench()
    assert not bench.look().apart
    assert not bench.look("few").apart
    assert not bench.look("few", after=SETTLE_SECONDS / 2).apart
    assert not bench.look("many", after=SETTLE_SECONDS / 2).apart  # it did not stand: begin anew
    assert not bench.look("few", after=1.0).apart
    plan = bench.look("few", after=SETTLE_SECONDS)
    assert plan.stages == {"old": "decode"}
    assert bench.look("many").apart
    assert not bench.look("many", after=SETTLE_SECONDS).apart


def test_a_reason_is_told_from_the_first_look_on() -> None:
    assert Bench().look("few").reason.startswith("together: until")
    assert Bench().look("many").reason.startswith("together: cards do best")


def test_an_empty_queue_changes_nothing() -> None:
    bench = Bench()
    bench.look("few")
    assert bench.look("few", after=SETTLE_SECONDS).apart
    assert bench.look(after=SETTLE_SECONDS).apart
    assert bench.look(after=SETTLE_SECONDS).apart


def test_the_jobs_that_take_most_work_decide() -> None:
    bench = Bench()
    bench.look("few", "many")
    assert not bench.look("few", "many", after=SETTLE_SECONDS).apart


def test_a_job_that_fits_only_a_decoder_gets_its_node_back_at_once() -> None:
    bench = Bench()
    bench.look("few")
    assert bench.look("few", after=SETTLE_SECONDS).apart
    assert not bench.look("few", "tiny").apart
    labelled = Bench(stages="apart")
    labelled.nodes[1] = node("old", "4x11GiB", wish="decode")
    assert labelled.look("few").apart
    assert not labelled.look("few", "tiny").apart
    assert labelled.look("few").apart


def test_labels_are_followed_at_once_and_together_always() -> None:
    bench = Bench(stages="apart")
    bench.nodes[1] = node("old", "4x11GiB", wish="decode")
    assert bench.look("many").stages == {"old": "decode"}
    assert bench.look("many").gain < 0
    assert not Bench(stages="together").look("few").apart


def test_nodes_that_go_take_their_stage_with_them_and_draining_ones_have_none() -> None:
    bench = Bench()
    bench.look("few")
    assert bench.look("few", after=SETTLE_SECONDS).apart
    bench.nodes[1] = node("old", "4x11GiB", draining=True)
    assert not bench.look("few").apart
    bench.nodes.clear()
    assert not bench.look("few").apart


def test_the_replicas_that_are_to_be_kept_up_keep_their_nodes() -> None:
    for minimum, apart in ((0, True), (2, True), (3, False), (6, False), (60, False)):
        bench = Bench(minimum=minimum)
        bench.look("few")
        assert bench.look("few", after=SETTLE_SECONDS).apart == apart
    bench = Bench(minimum=3)
    bench.nodes.append(node("older", "1x11GiB"))  # one of the two is enough: the one with room for more
    bench.look("few")
    assert bench.look("few", after=SETTLE_SECONDS).stages == {"older": "decode"}
    ordered = Bench(minimum=6, stages="apart")
    ordered.nodes[1] = node("old", "4x11GiB", wish="decode")
    assert ordered.look("few").stages == {"old": "decode"}
