"""Host memory for a tile-major decode: the mid features of all frames, and the halo rows between two tiles.

Copies run on a CUDA stream of their own, beside the computation. On the CPU the same calls copy at once; on the meta
device they copy nothing, which shows how much memory they take.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from wanduet.models.vae.arena import ALIGNMENT, Arena
from wanduet.models.vae.rows import Rows
from wanduet.models.vae.tiles import Halo

# Page-locked memory is allocated in pieces of this size, because its allocator rounds sizes up to a power of two.
PIECE_BYTES = 64 * 2**20


def page_locked_bytes(size: int) -> int:
    """Bytes of the page-locked piece that is allocated for a tensor of `size` bytes."""
    return max(PIECE_BYTES, 1 << (size - 1).bit_length())


@dataclass(frozen=True, slots=True)
class AsyncCopy:
    """A copy to `target` that may not be complete yet; `done` is recorded behind it on its CUDA stream."""

    target: Tensor
    done: "torch.cuda.Event | None" = None

    def wait(self) -> Tensor:
        """Return the filled target. On a GPU the current stream waits for the copy, not the host."""
        if self.done is not None:
            self.done.wait(torch.cuda.current_stream(self.done.device))
        return self.target


class HostTransfer:
    """Copies tensors between a device and host memory, page-locked for a GPU.

    The memory layout is kept, because kernels need channels last. A tensor on its way to the host must not be
    overwritten before its copy is complete.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def to_host(self, tensors: Iterable[Tensor]) -> list[AsyncCopy]:
        """Start to copy tensors without gaps in memory to the host, in order."""
        return self.copy([(x, self._host_like(x)) for x in tensors])

    def device_like(self, on_host: Tensor, arena: Arena | None) -> Tensor:
        """Uninitialised device memory for a tensor on the host; in `arena`, if given."""
        return torch.empty_like(on_host, device=self.device) if arena is None else arena.empty_like(on_host)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[AsyncCopy]:
        """Start to copy (source, target) pairs, in either direction, behind the work queued on the current stream.

        Only work queued before this call may still use the targets' memory.
        """
        if self._stream is None:
            return [
                AsyncCopy(target if self.device.type == "meta" else target.copy_(source)) for source, target in pairs
            ]
        copies = []
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
                copies.append(AsyncCopy(target, self._stream.record_event()))
        return copies

    def sync(self) -> None:
        """Let the current stream wait for all copies so far. Their tensors may be freed after this call."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def _host_like(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return torch.empty_like(x, device="cpu")
        size = prod(x.shape) * x.itemsize
        if self._used + size > self._piece.numel():
            self._piece = torch.empty(page_locked_bytes(size), dtype=torch.uint8, pin_memory=True)
            self._used = 0
        part = self._piece[self._used : self._used + size].view(x.dtype)
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return part.as_strided(x.shape, x.stride())


class HaloOffload(Halo):
    """A halo for tile-major decodes, where the upper tile decodes all frames before the lower one starts.

    The rows wait in host memory. The upper tile calls `evict` after each step. After `finish`, the lower tile calls
    `prefetch` before each step, and `finish` again at its end.
    """

    def __init__(self, wanted: Rows, arena: Arena | None, transfer: HostTransfer) -> None:
        super().__init__(wanted, arena)
        self._transfer = transfer
        self._steps: list[dict[int, Tensor]] = []
        self._copies: dict[int, AsyncCopy] = {}

    def store(self, index: int, x: Tensor) -> None:
        """Copy the last rows `[B, C, T, rows, w]` of layer `index`'s input, for the tile below."""
        self._wait()  # the last step's copies may still read the memory that is overwritten
        super().store(index, x)

    def evict(self) -> None:
        """Start to copy a step's rows to the host; all of them have been stored."""
        self._copies = dict(zip(self.rows, self._transfer.to_host(self.rows.values()), strict=True))
        self._steps.append({index: copy.target for index, copy in self._copies.items()})

    def finish(self) -> None:
        """End a tile. The device memory that its rows passed through is free after this call."""
        self._transfer.sync()
        self._copies.clear()
        self.rows.clear()

    def prefetch(self, step: int) -> None:
        """Start to copy a step's rows back to the device, and free their host memory."""
        self._wait()
        on_host, self._steps[step] = self._steps[step], {}
        for index, x in on_host.items():
            rows = self.rows.get(index)
            if rows is None or rows.shape != x.shape:
                # A video's first step has fewer frames: not worth arena memory.
                self.rows[index] = self._transfer.device_like(x, None if rows is None else self.arena)
        pairs = [(x, self.rows[index]) for index, x in on_host.items()]
        self._copies = dict(zip(on_host, self._transfer.copy(pairs), strict=True))

    def load(self, index: int, below: Tensor | None, count: int) -> Tensor:
        """The `count` rows stored for layer `index`, prefetched for this step."""
        return self._copies[index].wait()

    def _wait(self) -> None:
        """Wait for the last copy, and thereby for all."""
        if self._copies:
            self._copies.popitem()[1].wait()
            self._copies.clear()
