"""Replicas come for what waits, on the GPUs where it costs least, and go when nothing needs them."""

import pytest

from wanduet.cluster.autoscaler import Backlog, Changes, ScaleSettings, decide
from wanduet.cluster.fit import Fit, FitOf
from wanduet.cluster.shapes import Expected, Node, ReplicaView, Shape, declared_devices

NEED = {"small": 10, "middle": 30, "big": 70, "huge": 500}  # GiB over all devices of a replica
WORK = {"small": 60.0, "middle": 240.0, "big": 960.0, "huge": 1.0}  # device-seconds


def fits(shape: Shape) -> FitOf:
    room = sum(device.total_bytes for device in shape.devices) / 2**30
    return lambda demand: Fit(NEED[demand] <= room, WORK[demand] / max(1, shape.gpus))


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
