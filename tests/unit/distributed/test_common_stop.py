"""Ranks that stop within a step: before the same block, whichever is ahead, and none waits for ever."""

import random
import time
from collections import defaultdict
from collections.abc import Generator, Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from tests.forked import forked_ranks
from wanduet.distributed.common_stop import CommonStop
from wanduet.distributed.launch import RankGroup
from wanduet.distributed.rank import Rank

STEPS, BLOCKS = 3, 5
Stopped = tuple[int, int]  # before which block of which step


class Ranks:
    """Ranks that take turns in a random order. An exchange waits for all ranks, as a collective does."""

    def __init__(self, number: int, chance: random.Random) -> None:
        self.stop, self.chance = CommonStop(get_context("spawn"), number), chance
        self.exchanges = {block for block in range(BLOCKS) if chance.random() < 0.5}  # the blocks that have one
        self.knows = [False] * number  # which of them know of the cancel
        self.sent: dict[tuple[int, int, int], list[bool]] = defaultdict(list)

    def run(self, task: int, cancel_after: int) -> list[Stopped]:
        """Return where each rank stopped. They learn of the cancel one by one, after so many turns."""
        self.knows = [False] * len(self.knows)
        running = {index: self._rank(index, task) for index in range(len(self.knows))}
        stopped: dict[int, Stopped] = {}
        for turn in range(10_000):
            if turn > cancel_after:
                self.knows[self.chance.randrange(len(self.knows))] = True
            index = self.chance.choice(list(running))
            try:
                next(running[index])
            except StopIteration as end:
                stopped[index] = end.value
                del running[index]
            if not running:
                return [stopped[index] for index in sorted(stopped)]
        raise AssertionError("ranks wait for each other for ever")

    def _rank(self, index: int, task: int) -> Generator[None, None, Stopped]:
        for step in range(STEPS):
            if (yield from self._exchange((task, step, -1), self.knows[index])):
                return step, 0
            self.stop.begin_step(index, task)
            for block in range(BLOCKS):
                if self.stop.begin_block(index, cancelled=self.knows[index]):
                    return step, block
                yield
                if block in self.exchanges:
                    yield from self._exchange((task, step, block), False)
        return STEPS, 0

    def _exchange(self, which: tuple[int, int, int], flag: bool) -> Generator[None, None, bool]:
        self.sent[which].append(flag)
        while len(self.sent[which]) < len(self.knows):
            yield
        return any(self.sent[which])


def test_ranks_stop_at_one_place_in_whatever_order_they_run() -> None:
    places = set()
    for seed in range(100):
        chance = random.Random(seed)
        ranks = Ranks(chance.choice((2, 3, 4)), chance)
        for task in (1, 2, 5):  # another task begins right after a cancelled one
            stopped = ranks.run(task, chance.randrange(60))
            assert len(set(stopped)) == 1, seed
            places.add(stopped[0])
        assert ranks.run(6, 10_000) == [(STEPS, 0)] * len(ranks.knows), seed  # its cancel does not reach a later task
    assert {(0, 3), (1, 2), (2, 4), (1, 0), (STEPS, 0)} <= places


def test_a_rank_goes_no_further_than_the_others_need() -> None:
    stop = CommonStop(get_context("spawn"), 2)
    for rank in (0, 1):
        stop.begin_step(rank, task=1)
    assert [stop.begin_block(0, cancelled=False) for _ in range(3)] == [False, False, False]
    assert not stop.begin_block(1, cancelled=True)  # rank 0 waits in its third block
    assert [stop.begin_block(1, cancelled=True) for _ in range(3)] == [False, False, True]
    assert stop.begin_block(0, cancelled=False)  # it does not know of the cancel yet


@pytest.fixture
def _forked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))
    with forked_ranks():
        yield


def endless_steps(rank: Rank) -> None:
    """Steps without an end, whose blocks take one rank longer than the other."""
    while (kind := rank.receive()) is not None:
        made, stopped = 0, rank.cancelled()
        while not stopped:
            if kind == "exchanges":
                dist.all_reduce(torch.zeros(1))
            else:
                time.sleep(0.001 * (1 + rank.index))
            if made == 5:
                rank.report("busy")
            made += 1
            stopped = rank.cancelled_in_step()
        dist.barrier()  # nobody waits in a block
        rank.report(made)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.usefixtures("_forked")
def test_processes_stop_within_a_step_that_does_not_end() -> None:
    with RankGroup(endless_steps, ["cpu", "cpu"]) as group:
        for kind in ("exchanges", "alone", "exchanges"):
            task = group.send(kind)
            assert [group.receive(60.0, task)[1] for _ in range(2)] == ["busy", "busy"]
            group.cancel(task)
            group.cancel(task)
            (_, first), (_, second) = (group.receive(60.0, task) for _ in range(2))
            assert first == second > 5
        group.send(None)
        group.results()
