"""What waits on the host while a decode goes strip by strip: whole features, and rows that a strip hands on.

Copies run on a stream of their own, beside what the device computes. On the meta device and the CPU, where there is no
such stream, the same calls show how much memory they take, or copy at once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from wanduet.models.vae.arena import ALIGNMENT, Arena
from wanduet.models.vae.rows import Rows
from wanduet.models.vae.tiles import Halo

# Page-locked memory is taken in pieces of this size: its allocator rounds what it is asked for up to a power of two.
PIECE_BYTES = 64 * 2**20


def page_locked_bytes(size: int) -> int:
    """Of a piece that holds a tensor of `size` bytes."""
    return max(PIECE_BYTES, 1 << (size - 1).bit_length())


@dataclass(frozen=True, slots=True)
class Copying:
    """A copy that may still be under way to `target`."""

    target: Tensor
    over: "torch.cuda.Event | None" = None

    def arrive(self) -> Tensor:
        """The target, filled; on a GPU the current stream waits, not the host."""
        if self.over is not None:
            self.over.wait(torch.cuda.current_stream(self.over.device))
        return self.target


class Host:
    """The host's memory, seen from a device: tensors leave for it and come back, laid out as they are, for kernels want
    their channels side by side. What has left is to be kept unchanged until it has arrived."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def send(self, tensors: Iterable[Tensor]) -> list[Copying]:
        """Copies on the host of tensors without holes, one after the other."""
        return self.copy([(x, self._like(x)) for x in tensors])

    def room_for(self, waiting: Tensor, history: Arena | None) -> Tensor:
        """Memory of the device for it, in a history where there is one."""
        return torch.empty_like(waiting, device=self.device) if history is None else history.like(waiting)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Copying]:
        """Copies of tensors, there or back: pairs of them and memory that only earlier work of the current stream uses."""
        if self._stream is None:
            return [Copying(target if self.device.type == "meta" else target.copy_(source)) for source, target in pairs]
        copying = []
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
                copying.append(Copying(target, self._stream.record_event()))
        return copying

    def settle(self) -> None:
        """What the current stream is given from here on comes after all copies, which may then lose their memory."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def _like(self, x: Tensor) -> Tensor:
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
    """Between strips of which the upper one decodes all frames before the lower one begins: its rows wait on the host.

    What the upper strip keeps in a step goes there by `leave`. After `finish`, `bring` lets a step's rows come back, which
    the lower strip takes, until it has to `finish` too.
    """

    def __init__(self, wanted: Rows, history: Arena | None, host: Host) -> None:
        super().__init__(wanted, history)
        self._host = host
        self._steps: list[dict[int, Tensor]] = []
        self._copying: dict[int, Copying] = {}

    def store(self, index: int, x: Tensor) -> None:
        """A copy of rows `[B, C, T, rows, w]`."""
        self._arrive()  # the memory that they pass through may still be read
        super().keep(index, x)

    def leave(self) -> None:
        """All rows of a step are kept: they go to the host."""
        self._copying = dict(zip(self.rows, self._host.send(self.rows.values()), strict=True))
        self._steps.append({index: copying.target for index, copying in self._copying.items()})

    def finish(self) -> None:
        """A strip is done. The device's memory that rows passed through is free once this has returned."""
        self._host.settle()
        self._copying.clear()
        self.rows.clear()

    def bring(self, step: int) -> None:
        """Begin to bring back what was kept of a step, which waits on the host no longer."""
        self._arrive()
        waiting, self._steps[step] = self._steps[step], {}
        for index, x in waiting.items():
            rows = self.rows.get(index)
            if rows is None or rows.shape != x.shape:
                # A video's first step has fewer frames: not worth a lasting place.
                self.rows[index] = self._host.room_for(x, None if rows is None else self.history)
        pairs = [(x, self.rows[index]) for index, x in waiting.items()]
        self._copying = dict(zip(waiting, self._host.copy(pairs), strict=True))

    def load(self, index: int, below: Tensor | None, count: int) -> Tensor:
        """The `count` rows that were kept."""
        return self._copying[index].arrive()

    def _arrive(self) -> None:
        """Wait for the last copy, and so for all."""
        if self._copying:
            self._copying.popitem()[1].arrive()
            self._copying.clear()
