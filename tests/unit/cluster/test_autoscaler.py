"""Replicas come for what waits, on the GPUs where it costs least, and go when nothing needs them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wanduet.cluster.autoscaler import Backlog, Changes, ScaleSettings, decide
from wanduet.cluster.fit import Fit, FitOf
from wanduet.cluster.shapes import Expected, Node, ReplicaView, Shape, declared_devices

NEED = {"small": 10, "middle": 30, "big": 70, "huge": 500}  # GiB over all devices of a replica
WORK = {"small": 60.0, "middle": 240.0, "big": 960.0, "huge": 1.0}  # device-seconds


def fits(shape: Shape) -> FitOf:
    room = sum(device.total_bytes for device in shape.devices) / 2**30
    return lambda demand: Fit(shape.stage == "all" and NEED[demand] <= room, WORK[demand] / max(1, shape.gpus))


def node(name: str, gpus: str, **options: object) -> Node:
    return Node(name, name, declared_devices(gpus), 64 * 2**30, 8, **options)


def replica(name: str, on: Node, gpus: int = 1, **options: object) -> ReplicaView:
    return ReplicaView(name, on.id, on.shape(gpus), **{"state": "ready", **options})


def run(nodes, replicas=(), waiting=(), **options) -> Changes:
    defaults = {"minimum": 0, "upscale_seconds": 10.0, "idle_seconds": 300.0}
    return decide(nodes, replicas, waiting, fits, ScaleSettings(**(defaults | options)), "small")


API = Node("api", "api", computes=False)
PAIR, CARD = node("pair", "2x24GiB"), node("card", "1x80GiB")


def started(changes: Changes) -> list[tuple[str | None, int]]:
    return [(start.node, start.shape.gpus) for start in changes.start]


def test_nothing_runs_where_nothing_waits_and_the_minimum_is_zero() -> None:
    assert run([PAIR, CARD]) == Changes()


def test_the_minimum_is_kept_up_on_the_smallest_gpus_that_do() -> None:
    assert started(run([CARD, PAIR], minimum=2)) == [("pair", 1), ("pair", 1)]
    assert started(run([CARD, PAIR], minimum=9)) == [("pair", 1), ("pair", 1), ("card", 1)]


@pytest.mark.parametrize(("demand", "place"), [("small", ("pair", 1)), ("middle", ("pair", 2)), ("big", ("card", 1))])
def test_a_waiting_job_brings_the_replica_it_costs_least_on(demand: str, place: tuple[str, int]) -> None:
    assert started(run([CARD, PAIR], waiting=[Backlog(demand, 1, 0.0)])) == [place]


def test_an_old_queue_brings_more_replicas_and_a_young_one_does_not() -> None:
    four = node("four", "4x24GiB")
    busy = [replica("r", four, jobs=("j",))]
    assert started(run([four], busy, [Backlog("small", 9, 5.0)])) == []
    assert started(run([four], busy, [Backlog("small", 9, 20.0)])) == [("four", 1)] * 3
    assert started(run([four], busy, [Backlog("small", 9, 20.0)], maximum=2)) == [("four", 1)]
    assert started(run([four], busy, [Backlog("small", 1, 20.0)])) == [("four", 1)]


def test_replicas_that_are_coming_are_waited_for() -> None:
    four = node("four", "4x24GiB")
    coming = [replica(f"r{i}", four, state="starting") for i in range(3)]
    assert run([four], coming, [Backlog("small", 3, 60.0)]) == Changes()


def test_idle_replicas_go_but_not_below_the_minimum_nor_while_needed() -> None:
    four = node("four", "4x24GiB")
    idle = [replica(f"r{i}", four, idle_seconds=400.0 + i) for i in range(3)]
    assert run([four], idle).drain == ("r2", "r1", "r0")
    assert run([four], idle, minimum=2).drain == ("r2",)
    assert run([four], idle, waiting=[Backlog("small", 1, 1.0)]).drain == ()
    assert run([four], idle, waiting=[Backlog("middle", 1, 1.0)]).drain == ("r2", "r1", "r0")


def test_a_job_that_nobody_fits_gets_room_made() -> None:
    both = [replica("a", PAIR, jobs=("j",)), replica("b", PAIR, idle_seconds=5.0)]
    assert run([PAIR], both, [Backlog("middle", 1, 3.0)]) == Changes()  # not at once
    assert run([PAIR], both, [Backlog("middle", 1, 30.0)]).drain == ("b", "a")
    leaving = [replica("a", PAIR, state="draining"), replica("b", PAIR, state="draining")]
    assert run([PAIR], leaving, [Backlog("middle", 1, 60.0)]) == Changes()  # room is on its way
    assert started(run([PAIR], [], [Backlog("middle", 1, 61.0)])) == [("pair", 2)]


def test_a_full_fleet_gives_up_an_idle_replica_for_a_job_that_nobody_fits() -> None:
    idle = [replica("a", PAIR, idle_seconds=5.0)]
    assert run([PAIR, CARD], idle, [Backlog("big", 1, 30.0)], maximum=1).drain == ("a",)
    busy = [replica("a", PAIR, jobs=("j",))]
    assert run([PAIR, CARD], busy, [Backlog("big", 1, 30.0)], maximum=1).drain == ()


def test_what_fits_no_node_is_said() -> None:
    assert run([PAIR, CARD], waiting=[Backlog("huge", 1, 0.0)]).unfit == ("huge",)
    assert run([], waiting=[Backlog("huge", 1, 0.0)]).unfit == ()  # no node just now says nothing
    found = run([PAIR], waiting=[Backlog("huge", 1, 0.0)], expected=expected("8x80GiB"))
    assert (started(found), found.unfit) == ([(None, 8)], ())


def expected(*labels: str) -> tuple[Expected, ...]:
    return tuple(Expected(label, node("", label).shape(int(label[0]))) for label in labels)


def test_of_the_nodes_that_can_be_brought_the_one_comes_that_a_job_fits_at_the_least_cost() -> None:
    both = expected("1x80GiB", "2x24GiB")
    waiting = [Backlog("small", 1, 0.0)], [Backlog("big", 1, 0.0)], [Backlog("huge", 1, 0.0)]
    brought = [run([API], waiting=one, expected=both) for one in waiting]
    assert [[start.label for start in changes.start] for changes in brought] == [["2x24GiB"], ["1x80GiB"], []]
    assert brought[2].unfit == ("huge",)
    assert started(run([CARD], waiting=waiting[1], expected=both)) == [("card", 1)]  # it is there already


def test_a_draining_node_is_emptied_and_nothing_starts_there() -> None:
    leaving = node("pair", "2x24GiB", draining=True)
    changes = run([leaving, CARD], [replica("a", leaving, jobs=("j",))], minimum=1)
    assert (changes.drain, started(changes)) == (("a",), [("card", 1)])


def test_gpus_of_a_replica_may_be_fixed() -> None:
    four = node("four", "4x24GiB")
    assert started(run([four], minimum=4, gpus=2)) == [("four", 2), ("four", 2)]


def test_a_node_without_gpus_takes_one_replica_if_asked() -> None:
    cpu = Node("cpu", "cpu", (), 8 * 2**30, 4)
    found = decide([cpu], [], [], lambda shape: lambda demand: Fit(True), ScaleSettings(minimum=3), "small")
    assert started(found) == [("cpu", 0)]
    idle = Node("cpu", "cpu", (), 8 * 2**30, 4, computes=False)
    assert run([idle], minimum=1).start == ()


def staged(name: str, gpus: str, stage: str, **options: object) -> Node:
    return node(name, gpus, stage=stage, **options)


OLD, CPU = staged("old", "2x24GiB", "decode"), Node("cpu", "cpu", (), 2**34, 4, computes=False, stage="encode")


def test_nodes_of_a_stage_are_full_while_there_is_work_and_only_then() -> None:
    assert run([CARD, OLD, CPU]) == Changes()
    changes = run([CARD, OLD, CPU], waiting=[Backlog("small", 1, 0.0)])
    assert [(start.node, start.shape.name) for start in changes.start] == [
        ("card", "1x80GiB"),
        ("old", "1x24GiB decode"),
        ("old", "1x24GiB decode"),
        ("cpu", "cpu encode"),
    ]
    busy = [replica("r", CARD, jobs=("j",))]
    assert [start.node for start in run([CARD, OLD, CPU], busy).start] == ["old", "old", "cpu"]
    assert run([CARD, staged("old", "2x24GiB", "decode", resting=True)], busy).start == ()
    assert run([CARD, staged("old", "2x24GiB", "decode", draining=True)], busy).start == ()


def decoder(name: str, idle: float = 0.0) -> ReplicaView:
    return ReplicaView(name, "old", next(iter(OLD.shapes())), "ready", name, (), idle)


def test_stages_go_when_all_work_is_done_and_not_while_the_others_denoise() -> None:
    there = [replica("r", CARD, jobs=("j",)), decoder("a", 1e4), decoder("b", 1e4)]
    assert run([CARD, OLD], there) == Changes()
    there[0] = replica("r", CARD)
    assert run([CARD, OLD], there).drain == ("a", "b")
    assert run([CARD, OLD], there, minimum=3).drain == ("a", "b")  # the minimum is of replicas that do whole jobs


def test_a_node_that_changes_its_stage_is_emptied_first() -> None:
    whole = node("old", "2x24GiB")
    there = [replica("r", whole, jobs=("j",)), replica("s", whole)]
    changes = run([OLD], there, [Backlog("small", 1, 0.0)])
    assert changes.drain == ("r", "s")
    assert changes.start == ()  # their GPUs are not free yet
    assert run([whole], [decoder("a"), decoder("b")], [Backlog("small", 1, 0.0)]).drain == ("a", "b")


def test_the_maximum_counts_decoders_and_not_encoders() -> None:
    changes = run([CARD, OLD, CPU], waiting=[Backlog("small", 1, 0.0)], maximum=2)
    assert [start.node for start in changes.start] == ["card", "old", "cpu"]


def test_decodes_that_wait_bring_no_replicas_where_one_is_there_for_them() -> None:
    def fit(shape: Shape) -> FitOf:
        return lambda demand: Fit(shape.stage == "all" or demand.startswith("decode:"), 5.0)

    four = node("four", "4x24GiB")
    left = [Backlog("decode:small", 9, 1e4)]
    settings = ScaleSettings(minimum=0)
    assert decide([four], [replica("r", four, jobs=("j",))], left, fit, settings, "small") == Changes()
    assert len(decide([four], [], left, fit, settings, "small").start) == 1  # nobody else would end them


fleets = st.lists(st.tuples(st.integers(1, 8), st.sampled_from(["8GiB", "24GiB", "80GiB"])), min_size=1, max_size=5)
queues = st.lists(
    st.builds(Backlog, st.sampled_from(["small", "middle", "big"]), st.integers(1, 50), st.floats(0, 1e4)), max_size=3
)


@settings(max_examples=200)
@given(fleets, queues, st.integers(0, 4), st.integers(4, 12))
def test_whatever_waits_gpus_are_never_promised_twice_and_the_fleet_settles(fleet, queue, minimum, maximum) -> None:
    nodes = [node(f"n{i}", f"{count}x{size}") for i, (count, size) in enumerate(fleet)]
    queue = list({one.demand: one for one in queue}.values())
    live: list[ReplicaView] = []
    for turn in range(12):
        changes = run(nodes, live, queue, minimum=minimum, maximum=maximum)
        live = [one for one in live if one.id not in changes.drain]
        live += [replica(f"{turn}-{i}", nodes[0], jobs=("j",)) if start.node is None else
                 ReplicaView(f"{turn}-{i}", start.node, start.shape, "ready", None, ("j",))
                 for i, start in enumerate(changes.start)]  # fmt: skip
        assert len(live) <= maximum
        for one in nodes:
            assert sum(r.shape.gpus for r in live if r.node == one.id) <= len(one.devices)
    for one in queue:  # whatever can fit some node has a replica that fits it, or the fleet is full of busy ones
        possible = any(fits(shape)(one.demand).fits for n in nodes for shape in n.shapes())
        served = any(fits(r.shape)(one.demand).fits for r in live)
        assert served or not possible or one.waited < 10.0 or len(live) >= maximum or changes.drain or changes.start
