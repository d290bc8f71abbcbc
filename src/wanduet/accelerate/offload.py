"""Blocks that wait in host memory and come to the device while the ones before them compute.

A pass over an unchanged transformer: it replaces `fetch_blocks`, and the parameters of a block point
into a device buffer while it runs, into host memory otherwise. The values are copied, so results are
bit-equal to those of resident weights. Small float32 parameters (modulation tables, norms) never leave
the device.

On a GPU the copies run on a stream of their own, ordered by events against the stream that computes:
a buffer is filled only after the block that used it last, and used only after it is filled. The host
waits for neither. (With memory-mapped weights a thread copies through page-locked staging first, and
the host waits for that thread.) On a CPU the same code copies in line.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from wanduet.accelerate.host_memory import HostMemory
from wanduet.accelerate.packing import (
    Allocate,
    BlockLayout,
    allocate_packed,
    is_large,
    large_parameters,
    pack_block,
    packed_buffer,
)
from wanduet.models.dit.model import Block, WanTransformer


def streamed_indices(num_blocks: int, num_resident: int) -> tuple[int, ...]:
    """Which blocks wait on the host: spread evenly, so that each copy has as many blocks' time as any other."""
    if not 0 <= num_resident <= num_blocks:
        raise ValueError(f"num_resident={num_resident} is not in 0..{num_blocks}.")
    streamed = num_blocks - num_resident
    return tuple((j + 1) * num_blocks // streamed - 1 for j in range(streamed))


def allocate_streamed(
    transformer: WanTransformer, device: torch.device, dtype: torch.dtype, num_resident: int, memory: HostMemory
) -> None:
    """As `allocate_packed`, with the blocks that will be streamed in host memory from the start."""
    streamed = streamed_indices(len(transformer.blocks), num_resident)

    def allocate(index: int, size: int, dtype: torch.dtype) -> Tensor:
        return memory.allocate(size, dtype) if index in streamed else torch.empty(size, dtype=dtype, device=device)

    place: Allocate = allocate
    allocate_packed(transformer, device, dtype, place)


def stream_blocks(
    transformer: WanTransformer,
    device: torch.device,
    num_resident: int,
    memory: HostMemory | None = None,
    num_buffers: int = 2,
) -> "BlockStream":
    """Keep `num_resident` blocks on `device` and fetch the others in time, through `num_buffers` buffers.

    Takes a transformer whose weights are anywhere; blocks already in the right place stay there. May be
    called again with another number, for instance after memory ran out. `memory` is where blocks that
    must leave the device go (default: page-locked). Without resident blocks and buffers the transformer
    only waits: it cannot run until it is called again. Undone by the returned object's `close`.
    """
    if isinstance(transformer.fetch_blocks, BlockStream):
        memory = memory or transformer.fetch_blocks.memory
        transformer.fetch_blocks.close()
    stream = BlockStream(transformer, device, num_resident, memory or HostMemory("pinned"), num_buffers)
    transformer.fetch_blocks = stream  # type: ignore[method-assign]
    return stream


@dataclass(slots=True, eq=False)
class _Buffer:
    """Room for one block on the device, and what is in it."""

    flat: Tensor
    views: list[Tensor]
    staging: Tensor | None = None  # page-locked, where blocks are memory-mapped
    index: int | None = None
    filling: "Future[None] | None" = None
    filled: torch.cuda.Event | None = None
    free: torch.cuda.Event | None = None


@dataclass(slots=True)
class _Waiting:
    """A block's large parameters and their place in host memory."""

    parameters: list[nn.Parameter]
    flat: Tensor
    views: list[Tensor] = field(default_factory=list)

    def point_to(self, views: list[Tensor]) -> None:
        for parameter, view in zip(self.parameters, views, strict=True):
            parameter.data = view


class BlockStream:
    """Calling it yields the transformer's blocks in order, each ready on the device. See `stream_blocks`."""

    def __init__(
        self, transformer: WanTransformer, device: torch.device, num_resident: int, memory: HostMemory, num_buffers: int
    ) -> None:
        self.transformer, self.device, self.num_resident, self.memory = transformer, device, num_resident, memory
        self._blocks = [cast(Block, block) for block in transformer.blocks]
        self._order = streamed_indices(len(self._blocks), num_resident)
        self._waiting = self._place_blocks()
        self._on_gpu = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if self._on_gpu else None
        self._worker = ThreadPoolExecutor(1, "block-copy") if self._on_gpu and memory.hold == "mapped" else None
        self._idle = [self._make_buffer() for _ in range(min(num_buffers, len(self._order)))]
        self._queue: deque[_Buffer] = deque()  # filled or being filled, in the order of their use
        self._in_use: _Buffer | None = None

    def __call__(self) -> Iterator[Block]:
        """One pass. The next pass's first blocks are being fetched when it ends."""
        self._give_back()  # of a pass that was broken off
        for index, block in enumerate(self._blocks):
            if index not in self._waiting:
                yield block
                continue
            self._in_use = self._take(index)
            self._waiting[index].point_to(self._in_use.views)
            try:
                yield block
            finally:
                self._give_back()

    def close(self) -> None:
        """Stop streaming: waits for copies, frees the buffers; streamed blocks stay on the host."""
        self._give_back()
        if self._worker is not None:
            self._worker.shutdown()
        if self._copies is not None:
            self._copies.synchronize()
        self._queue.clear()
        self._idle.clear()
        with suppress(AttributeError):
            del self.transformer.fetch_blocks

    def _place_blocks(self) -> dict[int, _Waiting]:
        """Everything to where it belongs, block by block; returns the blocks that wait."""
        for parameter in _outside_large_products(self.transformer):
            parameter.data = parameter.data.to(self.device)
        waiting = {}
        for index, block in enumerate(self._blocks):
            layout, flat = BlockLayout.of(block), packed_buffer(block)
            streamed = index in self._order
            if flat is None or flat.device.type != ("cpu" if streamed else self.device.type):
                flat = self._move(index, block, layout, flat)
            if streamed:
                waiting[index] = _Waiting(large_parameters(block, layout), flat, layout.views(flat))
                waiting[index].point_to(waiting[index].views)
        return waiting

    def _move(self, index: int, block: Block, layout: BlockLayout, before: Tensor | None) -> Tensor:
        """The block's buffer on the other side, filled; `before` is the one that it had."""
        dtype = block.attn1.to_q.weight.dtype
        if index in self._order:
            kept = self.memory.copies.pop(index, None)
            if kept is not None:
                return kept
            flat = self.memory.allocate(layout.size, dtype)
        else:
            flat = torch.empty(layout.size, dtype=dtype, device=self.device)
        pack_block(block, flat)
        if before is not None and self.memory.retains_copies and index not in self._order:
            self.memory.copies[index] = before
        elif before is not None:
            self.memory.release(before)
        return flat

    def _make_buffer(self) -> _Buffer:
        layout, like = BlockLayout.of(self._blocks[0]), self._waiting[self._order[0]].flat
        flat = torch.empty_like(like, device=self.device)
        buffer = _Buffer(flat, layout.views(flat))
        if self._copies is not None:
            flat.record_stream(self._copies)
            buffer.filled, buffer.free = torch.cuda.Event(), torch.cuda.Event()
            # Its memory may have been another tensor's a moment ago, on the stream that computes.
            buffer.free.record(torch.cuda.current_stream(self.device))
            if self._worker is not None:
                buffer.staging = torch.empty_like(like, pin_memory=True)
        return buffer

    def _take(self, index: int) -> _Buffer:
        """The buffer that holds block `index`, once the computing stream may read it."""
        while self._queue and self._queue[0].index != index:
            self._idle.append(self._queue.popleft())
        if not self._queue:
            start = self._order.index(index)
            for offset in range(len(self._idle)):
                self._fill(self._idle.pop(0), self._order[(start + offset) % len(self._order)])
        buffer = self._queue.popleft()
        if buffer.filling is not None:
            buffer.filling.result()
        if buffer.filled is not None:
            torch.cuda.current_stream(self.device).wait_event(buffer.filled)
        return buffer

    def _give_back(self) -> None:
        """The block in use has been queued for computation: its buffer gets the next block after it."""
        buffer, self._in_use = self._in_use, None
        if buffer is None or buffer.index is None:
            return
        waiting = self._waiting[buffer.index]
        waiting.point_to(waiting.views)
        if buffer.free is not None:
            buffer.free.record(torch.cuda.current_stream(self.device))
        last = self._queue[-1].index if self._queue else buffer.index
        following = (self._order.index(cast(int, last)) + 1) % len(self._order)
        self._fill(buffer, self._order[following])

    def _fill(self, buffer: _Buffer, index: int) -> None:
        """Start to copy block `index` into `buffer`, after whatever still reads the buffer."""
        self._queue.append(buffer)
        if buffer.index == index:
            return
        buffer.index = index
        source = self._waiting[index].flat
        if self._worker is not None:
            buffer.filling = self._worker.submit(self._copy_staged, buffer, source)
        else:
            self._copy(buffer, source)

    def _copy(self, buffer: _Buffer, source: Tensor) -> None:
        if self._copies is None or buffer.free is None or buffer.filled is None:
            buffer.flat.copy_(source)
            return
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(buffer.free)
            buffer.flat.copy_(source, non_blocking=True)
            buffer.filled.record(self._copies)

    def _copy_staged(self, buffer: _Buffer, source: Tensor) -> None:
        """On the worker thread: through page-locked staging, once its last copy has left it."""
        if buffer.staging is not None and buffer.filled is not None:
            buffer.filled.synchronize()
            buffer.staging.copy_(source)
            source = buffer.staging
        self._copy(buffer, source)


def _outside_large_products(transformer: WanTransformer) -> Iterator[nn.Parameter]:
    for name, parameter in transformer.named_parameters():
        if not (name.startswith("blocks.") and is_large(name.split(".", 2)[2])):
            yield parameter
