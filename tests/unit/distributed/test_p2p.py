"""Exchanges by copies into other ranks' memory. Threads stand for ranks; copies are delayed at random."""

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
from wanduet.distributed.p2p.exchange import P2PExchange, p2p_buffer_bytes, p2p_exchange
from wanduet.distributed.p2p.keys import P2PAllGatherKV
from wanduet.errors import ConfigError
from wanduet.kernels.attention.backends import sdpa
from wanduet.kernels.attention.call import AttentionCall

TIMEOUT = 60.0


class Machine:
    """What the ranks share: a buffer each, and pending signals by receiver, sender and channel."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks)
        self.buffers = [torch.empty(0, dtype=torch.uint8)] * ranks
        self.signals: dict[tuple[int, int, int], queue.Queue[None]] = {}
        self._guard = threading.Lock()

    def pending(self, *key: int) -> "queue.Queue[None]":
        with self._guard:
            return self.signals.setdefault(key, queue.Queue(maxsize=1))


class DelayedPeerMemory:
    """A rank's `PeerMemory`: a thread makes its copies in order, each after a random delay."""

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
        for key in [key for key in self.machine.signals if key[0] == self.rank]:
            del self.machine.signals[key]  # signals lie beside the buffer
        self.machine.barrier.wait(TIMEOUT)
        return True

    def buffer(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        whole = self.machine.buffers[rank].view(dtype)
        return whole[offset : offset + torch.Size(shape).numel()].view(shape)

    def copy_wait_compute(self) -> None:
        pass  # the CPU computes synchronously

    def copy(self, source: Tensor, target: Tensor) -> None:
        assert source.shape == target.shape
        assert all(x.stride()[2:] == (x.shape[3], 1) for x in (source, target)), (
            "the heads of a token are not contiguous"
        )
        self.orders.put(partial(target.copy_, source))

    def signal(self, rank: int, channel: int) -> None:
        self.orders.put(partial(self.machine.pending(rank, self.rank, channel).put, None, timeout=TIMEOUT))

    def wait(self, rank: int, channel: int) -> None:
        self.machine.pending(self.rank, rank, channel).get(timeout=TIMEOUT)

    def copy_wait(self, rank: int, channel: int) -> None:
        self.orders.put(partial(self.machine.pending(self.rank, rank, channel).get, timeout=TIMEOUT))

    def wait_copies(self) -> None:
        self.orders.join()


def on_all(lengths: tuple[int, ...], work: Callable[[int, DelayedPeerMemory], list[Tensor]]) -> list[list[Tensor]]:
    machine = Machine(len(lengths))
    with ThreadPoolExecutor(len(lengths)) as pool:
        return list(pool.map(lambda rank: work(rank, DelayedPeerMemory(machine, rank)), range(len(lengths))))


def part(x: Tensor, lengths: tuple[int, ...], rank: int) -> Tensor:
    stop = list(accumulate(lengths))[rank]
    return x[:, stop - lengths[rank] : stop]


class SlowAttention:
    """Attention as on a GPU: its inputs are overwritten while it runs if a rank writes too early, and the memory of its
    results may be reused once nothing refers to them. Its calls must name the parts of `whole` that they get."""

    def __init__(self, whole: list[tuple[Tensor, ...]]) -> None:
        self.whole, self.made = whole, []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        heads = slice(call.first_head, call.first_head + q.shape[2])
        starts = (call.first_query, call.first_key, call.first_key)
        for x, all_of_it, first in zip((q, k, v), self.whole[call.block], starts, strict=True):
            assert torch.equal(x, all_of_it[:, first : first + x.shape[1], heads])
        half = q.shape[1] // 2
        first = sdpa(q[:, :half], k, v)
        time.sleep(random.choice((0, 0.003)))
        self.made.append(torch.cat((first, sdpa(q[:, half:], k, v)), dim=1))
        return self.made[-1]

    def reuse(self, kept: Tensor) -> None:
        for result in self.made:
            if result is not kept:
                result.fill_(torch.nan)
        self.made.clear()


def exchange_of(memory: DelayedPeerMemory, lengths: tuple[int, ...], rank: int, always_ulysses: bool) -> P2PExchange:
    return p2p_exchange(Layout(ulysses=len(lengths)), memory, lengths, rank, always_ulysses)


@pytest.mark.parametrize(
    ("lengths", "always_ulysses"),
    [
        *product([(7, 7), (1, 12), (5, 0)], (False, True)),
        *product([(4, 9, 6), (3, 3, 4, 4)], (True,)),
    ],
)
@pytest.mark.parametrize("order", [(2, 1, 0), (0, 1, 2)])
def test_every_block_is_attention_of_the_whole_sequence(
    lengths: tuple[int, ...], always_ulysses: bool, order: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    blocks, split = 6, (12, 8)
    packed = torch.randn(blocks, 1, sum(lengths), 3 * prod(split))
    qkv = [tuple(x.unflatten(-1, split) for x in block.chunk(3, dim=-1)) for block in packed]

    def work(rank: int, memory: DelayedPeerMemory) -> list[Tensor]:
        exchange = exchange_of(memory, lengths, rank, always_ulysses)
        results, attention = [], SlowAttention(qkv)
        for number, block in enumerate(qkv):
            own = [part(x, lengths, rank).clone() for x in block]
            for index in order:
                buffer = exchange.qkv_buffer(index, own[index].flatten(2))
                if buffer is not None and number % 2:  # in even blocks they are computed in other memory
                    buffer.copy_(own[index].flatten(2))
                    own[index] = buffer.unflatten(2, split)
                exchange.send_qkv(index, own[index])
            result = exchange.attend(own[0], own[1], own[2], attention, AttentionCall((1, 1, sum(lengths)), number))
            attention.reuse(result)
            for x in own:
                x.fill_(torch.nan)
            results.append(result.clone())
        return results

    results = on_all(lengths, work)
    for index, (q, k, v) in enumerate(qkv):
        expected = sdpa(q, k, v)
        for rank in range(len(lengths)):
            torch.testing.assert_close(results[rank][index], part(expected, lengths, rank), rtol=1e-5, atol=1e-5)
    assert not any(torch.isnan(x).any() for rank in results for x in rank)


@pytest.mark.parametrize("always_ulysses", [False, True])
def test_jobs_of_other_lengths_share_the_buffer(always_ulysses: bool) -> None:
    torch.manual_seed(0)
    sizes = [(6, 6), (9, 8), (2, 3)]
    inputs = [[torch.randn(1, sum(lengths), 4, 8) for _ in range(3)] for lengths in sizes]

    def work(rank: int, memory: DelayedPeerMemory) -> list[Tensor]:
        results = []
        for lengths, x in zip(sizes, inputs, strict=True):
            own = [part(y, lengths, rank) for y in x]
            exchange = exchange_of(memory, lengths, rank, always_ulysses)
            for index in range(3):
                exchange.send_qkv(index, own[index])
            results.append(exchange.attend(own[0], own[1], own[2], sdpa, AttentionCall((1, 1, sum(lengths)))).clone())
            memory.machine.barrier.wait(TIMEOUT)  # as the gather at the end of every forward
        return results

    results = on_all(sizes[0], work)
    for index, (lengths, (q, k, v)) in enumerate(zip(sizes, inputs, strict=True)):
        for rank in range(2):
            torch.testing.assert_close(results[rank][index], part(sdpa(q, k, v), lengths, rank), rtol=1e-5, atol=1e-5)


def test_heads_that_do_not_divide_are_refused() -> None:
    memory = DelayedPeerMemory(Machine(2), 0)
    x = torch.randn(1, 5, 3, 8)
    with pytest.raises(ConfigError, match="3 heads"):
        exchange_of(memory, (5, 5), 0, always_ulysses=True).send_qkv(0, x)
    with pytest.raises(ConfigError, match="3 heads"):
        exchange_of(memory, (5, 5), 0, always_ulysses=True).attend(x, x, x, sdpa, AttentionCall((1, 1, 10)))


def test_the_buffer_has_the_size_of_what_it_receives() -> None:
    # Keys and values of 20 tokens of 32 channels.
    assert p2p_buffer_bytes(Layout(ulysses=2), (9, 11), 32, 2) == 2 * 20 * 32 * 2
    # q, k and v of 30 tokens for a third of the channels, and the result of 11 tokens.
    assert p2p_buffer_bytes(Layout(ulysses=3), (9, 11, 10), 36, 2) == (3 * 30 * 12 + 11 * 36) * 2


@pytest.mark.parametrize(
    ("layout", "gathers_kv"),
    [(Layout(ulysses=2), True), (Layout(cfg=2, ulysses=2), True), (Layout(ulysses=4), False), (Layout(1, 2, 2), False)],
)
def test_two_ranks_gather_keys_and_others_exchange_heads(layout: Layout, gathers_kv: bool) -> None:
    exchange = p2p_exchange(layout, DelayedPeerMemory(Machine(1), 0), (5,) * layout.ulysses, 0)
    assert isinstance(exchange, P2PAllGatherKV) == gathers_kv
