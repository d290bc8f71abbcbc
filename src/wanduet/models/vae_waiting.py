"""What waits on the host while a decode goes strip by strip: whole features, and rows that a strip hands on.

Copies run on a stream of their own, beside what the device computes. On the meta device and the CPU, where there is no
such stream, the same calls show how much memory they take, or copy at once.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from wanduet.models.vae_history import ALIGNMENT, History
from wanduet.models.vae_rows import Rows
from wanduet.models.vae_strips import Seam

# Page-locked memory is taken in pieces of this size: its allocator rounds what it is asked for up to a power of two.
PIECE_BYTES = 64 * 2**20


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

    def send(self, x: Tensor) -> Copying:
        """A copy on the host of a tensor without holes."""
        return self._copy(x, self._like(x))

    def room_for(self, waiting: Tensor, history: History | None) -> Tensor:
        """Memory of the device for it, in a history where there is one."""
        return torch.empty_like(waiting, device=self.device) if history is None else history.like(waiting)

    def bring(self, waiting: Tensor, into: Tensor) -> Copying:
        """A copy on the device of what waits on the host, into memory that only earlier work of this stream uses."""
        return self._copy(waiting, into)

    def _copy(self, source: Tensor, target: Tensor) -> Copying:
        if self._stream is None:
            return Copying(target if self.device.type == "meta" else target.copy_(source))
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return Copying(target, self._stream.record_event())

    def _like(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return torch.empty_like(x, device="cpu")
        size = prod(x.shape) * x.itemsize
        if self._used + size > self._piece.numel():
            self._piece = torch.empty(max(size, PIECE_BYTES), dtype=torch.uint8, pin_memory=True)
            self._used = 0
        part = self._piece[self._used : self._used + size].view(x.dtype)
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return part.as_strided(x.shape, x.stride())


class HostSeam(Seam):
    """Between strips of which the upper one decodes all frames before the lower one begins: its rows wait on the host.

    First `next_step`, then what the upper strip keeps, for each step. After `turn`, for each step `bring`, then what
    the lower strip takes.
    """

    def __init__(self, wanted: Rows, history: History | None, host: Host) -> None:
        super().__init__(wanted, history)
        self._host = host
        self._steps: list[dict[int, Tensor]] = []
        self._copying: dict[int, Copying] = {}

    def next_step(self) -> None:
        """The upper strip goes on to the next frames."""
        self._steps.append({})

    def keep(self, index: int, x: Tensor) -> None:
        """Copy rows `[B, C, T, rows, w]` to the host."""
        if index in self._copying:  # the memory that they pass through may still be read
            self._copying[index].arrive()
        super().keep(index, x)
        self._copying[index] = self._host.send(self.rows[index])
        self._steps[-1][index] = self._copying[index].target

    def turn(self) -> None:
        """The upper strip is done. What it remembered is free once this has returned."""
        for copying in self._copying.values():
            copying.arrive()
        self._copying.clear()
        self.rows.clear()

    def bring(self, step: int) -> None:
        """Begin to bring back what was kept of a step, which waits on the host no longer."""
        for index, waiting in self._steps[step].items():
            rows = self.rows.get(index)
            if rows is None or rows.shape != waiting.shape:
                # A video's first step has fewer frames: not worth a lasting place.
                rows = self._host.room_for(waiting, None if rows is None else self.history)
            self._copying[index] = self._host.bring(waiting, rows)
            self.rows[index] = rows
        self._steps[step] = {}

    def take(self, index: int, below: Tensor | None, count: int) -> Tensor:
        """The `count` rows that were kept."""
        return self._copying[index].arrive()
