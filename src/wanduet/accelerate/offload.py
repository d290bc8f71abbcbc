"""Block offload: transformer blocks in host memory, copied to the device while the blocks before them compute.

A pass over an unchanged transformer: it replaces `fetch_blocks`, and the parameters of a block point into a device
buffer while it runs, into host memory otherwise. Values are only copied, so results are bit-equal to those of resident
weights. Small float32 parameters (modulation tables, norms) stay on the device.

On a GPU the copies run on a CUDA stream of their own, ordered by events against the computing stream: a buffer is
filled only after the block that used it last, and used only after it is filled. The host waits for neither.
(Memory-mapped weights are first copied to page-locked staging buffers by a thread, for which the host waits.) On a CPU
the copies run inline.
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
from wanduet.models.dit.block import Block
from wanduet.models.dit.model import WanTransformer


def streamed_indices(num_blocks: int, num_resident: int) -> tuple[int, ...]:
    """Indices of the blocks that are offloaded, spread evenly, so that each copy overlaps with equally many blocks.

    Raises ValueError if `num_resident` is not in 0..`num_blocks`.
    """
    if not 0 <= num_resident <= num_blocks:
        raise ValueError(f"num_resident={num_resident} is not in 0..{num_blocks}.")
    streamed = num_blocks - num_resident
    return tuple((j + 1) * num_blocks // streamed - 1 for j in range(streamed))


def allocate_streamed(
    transformer: WanTransformer, device: torch.device, dtype: torch.dtype, num_resident: int, memory: HostMemory
) -> None:
    """Allocate a transformer as `allocate_packed` does, with the blocks that will be offloaded in host memory."""
    streamed = streamed_indices(len(transformer.blocks), num_resident)

    def allocate(index: int, size: int) -> Tensor:
        if index in streamed:
            return memory.allocate(size, torch.uint8)
        return torch.empty(size, dtype=torch.uint8, device=device)

    place: Allocate = allocate
    allocate_packed(transformer, device, dtype, place)


def stream_blocks(
    transformer: WanTransformer,
    device: torch.device,
    num_resident: int,
    memory: HostMemory | None = None,
    num_buffers: int = 2,
) -> "BlockStream":
    """Keep `num_resident` blocks on `device` and stream the others from host memory through `num_buffers` buffers.

    The weights may be on any device; blocks already in the right place are not copied. May be called again with another
    number, for instance after running out of memory. `memory`: for blocks that leave the device (default: that of the
    last call, else page-locked). With no resident blocks and no buffers the transformer is swapped out, and cannot run
    until this is called again. Closing the returned object stops the streaming.
    """
    if isinstance(transformer.fetch_blocks, BlockStream):
        memory = memory or transformer.fetch_blocks.memory
        transformer.fetch_blocks.close()
    stream = BlockStream(transformer, device, num_resident, memory or HostMemory("pinned"), num_buffers)
    transformer.fetch_blocks = stream  # type: ignore[method-assign]
    return stream


@dataclass(slots=True, eq=False)
class _Buffer:
    """Device memory for one block, and the block `index` that it contains or is being filled with."""

    flat: Tensor
    views: list[Tensor]
    staging: Tensor | None = None  # page-locked, where blocks are memory-mapped
    index: int | None = None
    filling: "Future[None] | None" = None
    filled: torch.cuda.Event | None = None
    free: torch.cuda.Event | None = None


@dataclass(slots=True)
class _Offloaded:
    """An offloaded block's large parameters, and its buffer in host memory."""

    parameters: list[nn.Parameter]
    flat: Tensor
    views: list[Tensor] = field(default_factory=list)

    def point_to(self, views: list[Tensor]) -> None:
        """Make the parameters views of another buffer."""
        for parameter, view in zip(self.parameters, views, strict=True):
            parameter.data = view


class BlockStream:
    """Yields, when called, the transformer's blocks in order, each ready on the device. See `stream_blocks`."""

    def __init__(
        self, transformer: WanTransformer, device: torch.device, num_resident: int, memory: HostMemory, num_buffers: int
    ) -> None:
        self.transformer, self.device, self.num_resident, self.memory = transformer, device, num_resident, memory
        self._blocks = [cast(Block, block) for block in transformer.blocks]
        self._order = streamed_indices(len(self._blocks), num_resident)
        self._offloaded = self._place_blocks()
        self._on_gpu = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if self._on_gpu else None
        self._worker = ThreadPoolExecutor(1, "block-copy") if self._on_gpu and memory.kind == "mapped" else None
        self._idle = [self._make_buffer() for _ in range(min(num_buffers, len(self._order)))]
        self._queue: deque[_Buffer] = deque()  # filled or being filled, in the order of their use
        self._in_use: _Buffer | None = None

    def __call__(self) -> Iterator[Block]:
        """Run one pass. At its end, the first blocks of the next pass are already being copied."""
        self._release()  # the buffer of a pass that was interrupted
        for index, block in enumerate(self._blocks):
            if index not in self._offloaded:
                yield block
                continue
            self._in_use = self._acquire(index)
            self._offloaded[index].point_to(self._in_use.views)
            try:
                yield block
            finally:
                self._release()

    def forget_copies(self) -> None:
        """Wait for copies, and drop those in device buffers: call it before the weights in host memory change."""
        self._release()  # of a pass that was interrupted
        for buffer in self._queue:
            if buffer.filling is not None:
                buffer.filling.result()
        if self._copies is not None:
            self._copies.synchronize()
        self._idle.extend(self._queue)
        self._queue.clear()
        for buffer in self._idle:
            buffer.index = None

    def close(self) -> None:
        """Stop streaming: wait for copies, and free the device buffers. Offloaded blocks stay in host memory."""
        self._release()
        if self._worker is not None:
            self._worker.shutdown()
        if self._copies is not None:
            self._copies.synchronize()
        self._queue.clear()
        self._idle.clear()
        with suppress(AttributeError):
            del self.transformer.fetch_blocks

    def _place_blocks(self) -> dict[int, _Offloaded]:
        """Move all parameters to their place, block by block; returns the offloaded blocks by index."""
        for parameter in _outside_large_products(self.transformer):
            parameter.data = parameter.data.to(self.device)
        offloaded = {}
        for index, block in enumerate(self._blocks):
            layout, flat = BlockLayout.of(block), packed_buffer(block)
            streamed = index in self._order
            if flat is None or flat.device.type != ("cpu" if streamed else self.device.type):
                flat = self._move(index, block, layout, flat)
            if streamed:
                offloaded[index] = _Offloaded(large_parameters(block, layout), flat, layout.views(flat))
                offloaded[index].point_to(offloaded[index].views)
        return offloaded

    def _move(self, index: int, block: Block, layout: BlockLayout, before: Tensor | None) -> Tensor:
        """Move a block from its buffer `before`, if it was packed, to one on the other side, which is returned."""
        if index in self._order:
            retained = self.memory.copies.pop(index, None)
            if retained is not None:
                return retained
            flat = self.memory.allocate(layout.size, torch.uint8)
        else:
            flat = torch.empty(layout.size, dtype=torch.uint8, device=self.device)
        pack_block(block, flat)
        if before is not None and self.memory.retains_copies and index not in self._order:
            self.memory.copies[index] = before
        elif before is not None:
            self.memory.release(before)
        return flat

    def _make_buffer(self) -> _Buffer:
        layout, like = BlockLayout.of(self._blocks[0]), self._offloaded[self._order[0]].flat
        flat = torch.empty_like(like, device=self.device)
        buffer = _Buffer(flat, layout.views(flat))
        if self._copies is not None:
            flat.record_stream(self._copies)
            buffer.filled, buffer.free = torch.cuda.Event(), torch.cuda.Event()
            # Work queued on the computing stream may still use this memory, for a tensor that has been freed.
            buffer.free.record(torch.cuda.current_stream(self.device))
            if self._worker is not None:
                buffer.staging = torch.empty_like(like, pin_memory=True)
        return buffer

    def _acquire(self, index: int) -> _Buffer:
        """The buffer with block `index`; the computing stream waits until it is filled."""
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

    def _release(self) -> None:
        """Refill the buffer in use with the next block in order, behind the queued work of the block that used it."""
        buffer, self._in_use = self._in_use, None
        if buffer is None or buffer.index is None:
            return
        offloaded = self._offloaded[buffer.index]
        offloaded.point_to(offloaded.views)
        if buffer.free is not None:
            buffer.free.record(torch.cuda.current_stream(self.device))
        last = self._queue[-1].index if self._queue else buffer.index
        following = (self._order.index(cast(int, last)) + 1) % len(self._order)
        self._fill(buffer, self._order[following])

    def _fill(self, buffer: _Buffer, index: int) -> None:
        """Start to copy block `index` into `buffer`, behind the work that still reads the buffer."""
        self._queue.append(buffer)
        if buffer.index == index:
            return
        buffer.index = index
        source = self._offloaded[index].flat
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
        """Copy through the page-locked staging buffer, once its last copy is complete. Runs on the worker thread."""
        if buffer.staging is not None and buffer.filled is not None:
            buffer.filled.synchronize()
            buffer.staging.copy_(source)
            source = buffer.staging
        self._copy(buffer, source)


def _outside_large_products(transformer: WanTransformer) -> Iterator[nn.Parameter]:
    for name, parameter in transformer.named_parameters():
        if not (name.startswith("blocks.") and is_large(name.split(".", 2)[2])):
            yield parameter
