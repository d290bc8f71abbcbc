"""Exchange by copies into other ranks' memory: threads stand for ranks, copies come late and in their own time."""

import queue
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate, product
from math import prod

import pytest
import torch
from torch import Tensor

from wanduet.distributed.mesh import Layout
from wanduet.distributed.p2p.exchange import DirectExchange, direct_bytes, direct_exchange
from wanduet.distributed.p2p.keys import DirectKeys
from wanduet.errors import ConfigError
from wanduet.kernels.attention.backends import sdpa

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

    def reuse(self, held: Tensor) -> None:
        for result in self.made:
            if result is not held:
                result.fill_(torch.nan)
        self.made.clear()


def exchange_of(peers: LatePeers, lengths: tuple[int, ...], rank: int, heads: bool) -> DirectExchange:
    return direct_exchange(Layout(ulysses=len(lengths)), peers, lengths, rank, heads)


@pytest.mark.parametrize(
    ("lengths", "heads"),
    [
        *product([(7, 7), (1, 12), (5, 0)], (False, True)),
        *product([(4, 9, 6), (3, 3, 4, 4)], (True,)),
    ],
)
@pytest.mark.parametrize("order", [(2, 1, 0), (0, 1, 2)])
def test_every_block_is_attention_of_the_whole_sequence(
    lengths: tuple[int, ...], heads: bool, order: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    blocks, split = 6, (12, 8)
    packed = torch.randn(blocks, 1, sum(lengths), 3 * prod(split))
    qkv = [tuple(x.unflatten(-1, split) for x in block.chunk(3, dim=-1)) for block in packed]

    def work(rank: int, peers: LatePeers) -> list[Tensor]:
        exchange = exchange_of(peers, lengths, rank, heads)
        results, attention = [], SlowAttention()
        for number, block in enumerate(qkv):
            own = [part(x, lengths, rank).clone() for x in block]
            for index in order:
                room = exchange.room(index, own[index].flatten(2))
                if room is not None and number % 2:  # in other blocks they are computed elsewhere
                    room.copy_(own[index].flatten(2))
                    own[index] = room.unflatten(2, split)
                exchange.send(index, own[index])
            result = exchange.attend(own[0], own[1], own[2], attention)
            attention.reuse(result)
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


@pytest.mark.parametrize("heads", [False, True])
def test_jobs_of_other_lengths_share_the_buffer(heads: bool) -> None:
    torch.manual_seed(0)
    sizes = [(6, 6), (9, 8), (2, 3)]
    inputs = [[torch.randn(1, sum(lengths), 4, 8) for _ in range(3)] for lengths in sizes]

    def work(rank: int, peers: LatePeers) -> list[Tensor]:
        results = []
        for lengths, x in zip(sizes, inputs, strict=True):
            own = [part(y, lengths, rank) for y in x]
            exchange = exchange_of(peers, lengths, rank, heads)
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
        exchange_of(peers, (5, 5), 0, heads=True).send(0, x)
    with pytest.raises(ConfigError, match="3 heads"):
        exchange_of(peers, (5, 5), 0, heads=True).attend(x, x, x, sdpa)


def test_the_buffer_is_as_large_as_what_comes() -> None:
    # Keys and values of 20 tokens of 32 channels.
    assert direct_bytes(Layout(ulysses=2), (9, 11), 32, 2) == 2 * 20 * 32 * 2
    # q, k and v of 30 tokens for a third of the channels, and the result of 11 tokens.
    assert direct_bytes(Layout(ulysses=3), (9, 11, 10), 36, 2) == (3 * 30 * 12 + 11 * 36) * 2


@pytest.mark.parametrize(
    ("layout", "keys"),
    [(Layout(ulysses=2), True), (Layout(cfg=2, ulysses=2), True), (Layout(ulysses=4), False), (Layout(1, 2, 2), False)],
)
def test_two_ranks_send_keys_and_others_swap_heads(layout: Layout, keys: bool) -> None:
    exchange = direct_exchange(layout, LatePeers(Machine(1), 0), (5,) * layout.ulysses, 0)
    assert isinstance(exchange, DirectKeys) == keys
