"""One block of memory for all that a decode remembers.

What is remembered lives as long as a strip of rows or a video, what is computed in between for a moment. Allocated
one by one in turn, the former would lie scattered among holes of the latter's size, and the allocator would hold a
tenth more than was ever used.
"""

from math import prod

import torch
from torch import Tensor

ALIGNMENT = 512  # bytes, as the CUDA allocator's


class Arena:
    """Hands out parts of one buffer of `size` bytes, one after the other; what does not fit is allocated apart."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self._used = 0

    def like(self, frames: Tensor) -> Tensor:
        """Room for frames `[B, C, T, h, w]` (of any device), in their layout."""
        size = prod(frames.shape) * frames.itemsize
        if self._used + size > self._buffer.numel():
            return torch.empty_like(frames, device=self._buffer.device)
        part = self._buffer[self._used : self._used + size].view(frames.dtype)
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return part.as_strided(frames.shape, torch.empty_like(frames, device="meta").stride())

    def copy_of(self, frames: Tensor) -> Tensor:
        """A copy of frames."""
        return copy_frames(self.like(frames), frames)

    def forget(self) -> None:
        """Begin again at the front. Nothing that was handed out may be in use any more."""
        self._used = 0


def copy_frames(into: Tensor, frames: Tensor) -> Tensor:
    """`into`, filled with frames `[B, C, T, h, w]`. With memory between them, one by one: a frame without holes is copied at
    the memory's full speed, what PyTorch does for all at once is not."""
    apart = frames.stride(1) == 1 and not frames.is_contiguous(memory_format=torch.channels_last_3d)
    for index in range(frames.shape[2] if apart else 0):
        into[:, :, index] = frames[:, :, index]
    return into if apart else into.copy_(frames)
