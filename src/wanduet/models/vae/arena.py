"""One block of memory for the tensors that a decode keeps from step to step.

Feature caches live as long as a tile or a video, intermediate results only for a moment. If both came from the
allocator one by one, the caches would lie between holes of the size of intermediate results, and the allocator would
reserve a tenth more than was ever used.
"""

from math import prod

import torch
from torch import Tensor

ALIGNMENT = 512  # bytes, as the CUDA allocator's


class Arena:
    """A bump allocator in one buffer of `size` bytes on `device`. A tensor that does not fit gets memory of its own."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self._used = 0

    def empty_like(self, frames: Tensor) -> Tensor:
        """An uninitialised tensor of the shape, dtype and memory layout of frames `[B, C, T, h, w]` (on any device)."""
        size = prod(frames.shape) * frames.itemsize
        if self._used + size > self._buffer.numel():
            return torch.empty_like(frames, device=self._buffer.device)
        part = self._buffer[self._used : self._used + size].view(frames.dtype)
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return part.as_strided(frames.shape, torch.empty_like(frames, device="meta").stride())

    def clone(self, frames: Tensor) -> Tensor:
        """A copy of frames `[B, C, T, h, w]` in the arena."""
        return copy_frames(self.empty_like(frames), frames)

    def reset(self) -> None:
        """Reuse the buffer from its start. No tensor allocated before may still be in use."""
        self._used = 0


def copy_frames(target: Tensor, frames: Tensor) -> Tensor:
    """Copy frames `[B, C, T, h, w]` into `target` of the same shape, and return it.

    Frames with gaps in memory between them are copied one by one: a frame without gaps is copied at the memory's full
    speed, PyTorch's copy of all frames at once is not.
    """
    spread = frames.stride(1) == 1 and not frames.is_contiguous(memory_format=torch.channels_last_3d)
    for index in range(frames.shape[2] if spread else 0):
        target[:, :, index] = frames[:, :, index]
    return target if spread else target.copy_(frames)
