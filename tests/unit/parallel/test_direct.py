"""Exchange by copies into other ranks' memory: threads stand for ranks, copies come late and in their own time."""

import queue
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from wanduet.errors import ConfigError
from wanduet.ops.attention import sdpa
from wanduet.parallel.direct import DirectExchange, direct_bytes

TIMEOUT = 10.0


class Machine:
    """What the ranks have in common: a buffer each, and a word that may be on its way, by receiver, sender, channel."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks)
        self.buffers = [torch.empty(0, dtype=torch.uint8)] * ranks
        self.words: dict[tuple[int, int, int], queue.Queue[None]] = {}
        self._guard = threading.Lock()

    def word(self, *key: int) -> "queue.Queue[None]":
        with self._guard:
            return self.words.setdefault(key, queue.Queue(maxsize=1))


class LatePeers:
    """A rank's `PeerMemory`: a thread makes its copies, in order, whenever it gets to them."""

    def __init__(self, machine: Machine, rank: int) -> None:
        self.machine, self.rank = machine, rank
        self.orders: queue.Queue[Callable[[], object]] = queue.Queue()
        self.size = 0
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            order = self.orders.get()
            time.sleep(random.choice((0, 0, 0.002)))
            order()
            self.orders.task_done()

    def reserve(self, size: int) -> bool:
        if size <= self.size:
            return False
        self.orders.join()
        self.size = size
        self.machine.barrier.wait(TIMEOUT)
        self.machine.buffers[self.rank] = torch.full((size,), 255, dtype=torch.uint8)  # NaN where nothing comes
        for key in [key for key in self.machine.words if key[0] == self.rank]:
            del self.machine.words[key]  # words are kept beside the buffer
        self.machine.barrier.wait(TIMEOUT)
        return True

    def on(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        whole = self.machine.buffers[rank].view(dtype)
        return whole[offset : offset + torch.Size(shape).numel()].view(shape)

    def follow(self) -> None:
        pass  # here nothing is computed later than it is asked for

    def copy(self, source: Tensor, target: Tensor) -> None:
        assert source.shape == target.shape
        assert all(x.stride()[2:] == (x.shape[3], 1) for x in (source, target)), "no rows"
        self.orders.put(partial(target.copy_, source))

    def tell(self, rank: int, channel: int) -> None:
        self.orders.put(partial(self.machine.word(rank, self.rank, channel).put, None, timeout=TIMEOUT))

    def hear(self, rank: int, channel: int) -> None:
        self.machine.word(self.rank, rank, channel).get(timeout=TIMEOUT)

    def heed(self, rank: int, channel: int) -> None:
        self.orders.put(partial(self.machine.word(self.rank, rank, channel).get, timeout=TIMEOUT))

    def join(self) -> None:
        self.orders.join()


def on_all(lengths: tuple[int, ...], work: Callable[[int, LatePeers], list[Tensor]]) -> list[list[Tensor]]:
    machine = Machine(len(lengths))
    with ThreadPoolExecutor(len(lengths)) as pool:
        return list(pool.map(lambda rank: work(rank, LatePeers(machine, rank)), range(len(lengths))))


def part(x: Tensor, lengths: tuple[int, ...], rank: int) -> Tensor:
    stop = list(accumulate(lengths))[rank]
    return x[:, stop - lengths[rank] : stop]


class SlowAttention:
    """As a GPU's: what it reads may be overwritten while it runs, if somebody writes too early; and the memory of its
    results is somebody else's as soon as nobody holds them."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        half = q.shape[1] // 2
        first = sdpa(q[:, :half], k, v)
        time.sleep(random.choice((0, 0.003)))
        self.made.append(torch.cat((first, sdpa(q[:, half:], k, v)), dim=1))
        return self.made[-1]

    def reuse(self) -> None:
        for result in self.made:
            result.fill_(torch.nan)
        self.made.clear()


@pytest.mark.parametrize("lengths", [(7, 7), (1, 12), (5, 0), (4, 9, 6), (3, 3, 4, 4)])
@pytest.mark.parametrize("order", [(2, 1, 0), (0, 1, 2)])
def test_every_block_is_attention_of_the_whole_sequence(lengths: tuple[int, ...], order: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    blocks, heads, channels = 6, 12, 8
    packed = torch.randn(blocks, 1, sum(lengths), 3 * heads * channels)
    qkv = [tuple(x.unflatten(-1, (heads, channels)) for x in block.chunk(3, dim=-1)) for block in packed]

    def work(rank: int, peers: LatePeers) -> list[Tensor]:
        exchange = DirectExchange(peers, lengths, rank)
        results, attention = [], SlowAttention()
        for block in qkv:
            own = [part(x, lengths, rank).clone() for x in block]
            for index in order:
                exchange.send(index, own[index])
            result = exchange.attend(own[0], own[1], own[2], attention)
            attention.reuse()
            for x in own:
                x.fill_(torch.nan)
            results.append(result.clone())
        return results

    found = on_all(lengths, work)
    for index, (q, k, v) in enumerate(qkv):
        expected = sdpa(q, k, v)
        for rank in range(len(lengths)):
            torch.testing.assert_close(found[rank][index], part(expected, lengths, rank), rtol=1e-5, atol=1e-5)
    assert not any(torch.isnan(x).any() for rank in found for x in rank)


def test_jobs_of_other_lengths_share_the_buffer() -> None:
    torch.manual_seed(0)
    sizes = [(6, 6), (9, 8), (2, 3)]
    inputs = [[torch.randn(1, sum(lengths), 4, 8) for _ in range(3)] for lengths in sizes]

    def work(rank: int, peers: LatePeers) -> list[Tensor]:
        results = []
        for lengths, x in zip(sizes, inputs, strict=True):
            own = [part(y, lengths, rank) for y in x]
            exchange = DirectExchange(peers, lengths, rank)
            for index in range(3):
                exchange.send(index, own[index])
            results.append(exchange.attend(own[0], own[1], own[2], sdpa).clone())
            peers.machine.barrier.wait(TIMEOUT)  # as the gather at the end of every forward
        return results

    found = on_all(sizes[0], work)
    for index, (lengths, (q, k, v)) in enumerate(zip(sizes, inputs, strict=True)):
        for rank in range(2):
            torch.testing.assert_close(found[rank][index], part(sdpa(q, k, v), lengths, rank), rtol=1e-5, atol=1e-5)


def test_heads_that_do_not_divide_are_refused() -> None:
    peers = LatePeers(Machine(2), 0)
    x = torch.randn(1, 5, 3, 8)
    with pytest.raises(ConfigError, match="3 heads"):
        DirectExchange(peers, (5, 5), 0).send(0, x)
    with pytest.raises(ConfigError, match="3 heads"):
        DirectExchange(peers, (5, 5), 0).attend(x, x, x, sdpa)


def test_the_buffer_is_as_large_as_what_comes() -> None:
    # q, k and v of 20 tokens for 2 of 4 heads of 8 channels, and the result of 11 tokens.
    assert direct_bytes((9, 11), 4 * 8, 2) == (3 * 20 * 2 * 8 + 11 * 4 * 8) * 2
