"""Peer memory of the GPUs of one machine, with copies by their copy engines and signals by the CUDA driver.

PyTorch's symmetric memory maps a buffer of every rank into all ranks. The CUDA driver copies rows of any length and
pitch, and writes words and waits for them. PyTorch would launch kernels for these words; such a kernel waits for a
multiprocessor, which a running attention releases only at its end. So a rank that attends could not signal that its
keys have arrived, and the other rank would attend after it, not beside it (two H100, 480p: 281 ms a step, with words by
the driver 234).
"""

import ctypes
import logging
import math
import os
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor
from torch import distributed as dist

from wanduet.distributed.collectives import all_gather_object, uses_nccl
from wanduet.distributed.split import other_ranks

log = logging.getLogger(__name__)

MEMORYTYPE_UNIFIED = 4  # CU_MEMORYTYPE_UNIFIED: the driver finds the device from the address
WAIT_VALUE_GEQ = 0  # CU_STREAM_WAIT_VALUE_GEQ
CHANNELS = 16  # for each ordered pair of ranks
SIGNAL_BYTES = 4  # a signal is a word of 32 bits
# The shape [B, L, H, D] of the tensor that the trial of a new group sends: rows of some of the heads.
TRIAL_SHAPE = (1, 67, 6, 128)


class _CudaMemcpy2D(ctypes.Structure):
    """CUDA_MEMCPY2D of cuda.h."""

    _fields_ = (
        ("source_x", ctypes.c_size_t),
        ("source_y", ctypes.c_size_t),
        ("source_type", ctypes.c_uint),
        ("source_host", ctypes.c_void_p),
        ("source_device", ctypes.c_void_p),
        ("source_array", ctypes.c_void_p),
        ("source_pitch", ctypes.c_size_t),
        ("target_x", ctypes.c_size_t),
        ("target_y", ctypes.c_size_t),
        ("target_type", ctypes.c_uint),
        ("target_host", ctypes.c_void_p),
        ("target_device", ctypes.c_void_p),
        ("target_array", ctypes.c_void_p),
        ("target_pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


class GpuPeerMemory:
    """A `PeerMemory` of a group with one GPU for each rank, all of which have peer access to each other."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """Use `from_group`, which checks that copies and signals work."""
        self._group, self.device = group, device
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self._copy_stream = torch.cuda.Stream(device)
        self._size = 0
        self._symmetric: Any = None
        self._buffer: Tensor | None = None  # `_symmetric` does not keep it alive
        self._signal_pads: list[int] = []  # the address of each rank's signals, which lie behind its buffer
        # A signal is a counter. How often this rank has signalled and waited so far, by rank and channel:
        self._signalled: Counter[tuple[int, int]] = Counter()
        self._waited: Counter[tuple[int, int]] = Counter()

    @classmethod
    def from_group(cls, group: dist.ProcessGroup, device: torch.device) -> Self | None:
        """Create the memory for all ranks of `group`, which must all call this.

        Returns None on every rank if a GPU has no peer access to another, or if what was received in a trial is not
        what was sent.
        """
        if dist.get_world_size(group) == 1 or not all(all_gather_object(_has_peer_access(group, device), group)):
            return None
        memory = cls(group, device)
        trial = _Trial(memory)
        # All ranks finish a step before any starts the next: no GPU waits for a signal that may never arrive.
        for step in (trial.prepare, trial.send, trial.check_received, trial.wait):
            if not all(all_gather_object(_succeeds(step), group)):
                return None
        memory._drop()  # the first `reserve` gets a new buffer, whose signals are zero
        return memory

    def reserve(self, size: int) -> bool:
        """See PeerMemory."""
        if size <= self._size:
            return False
        from torch.distributed import _symmetric_memory as symmetric

        self._drop()
        words, signals = -(-size // SIGNAL_BYTES), self.ranks * CHANNELS
        self._buffer = symmetric.empty((words + signals) * SIGNAL_BYTES, dtype=torch.uint8, device=self.device)
        self._buffer[words * SIGNAL_BYTES :].zero_()
        torch.cuda.synchronize(self.device)  # every rank's signals are zero before the rendezvous
        self._symmetric = symmetric.rendezvous(self._buffer, self._group)
        self._signal_pads = [self.buffer(rank, words, (signals,), torch.int32).data_ptr() for rank in range(self.ranks)]
        self._signalled.clear()
        self._waited.clear()
        self._size = words * SIGNAL_BYTES
        return True

    def buffer(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See PeerMemory."""
        view: Tensor = self._symmetric.get_buffer(rank, shape, dtype, offset)
        return view

    def copy(self, source: Tensor, target: Tensor) -> None:
        """See PeerMemory. Raises ValueError if the heads of a token are not contiguous."""
        if not source.numel():
            return
        _, length, heads, channels = source.shape
        item = source.itemsize
        if any(x.stride(3) != 1 or (heads > 1 and x.stride(2) != channels) for x in (source, target)):
            raise ValueError("Copies between GPUs need the heads of a token to be contiguous in memory.")
        copy = _CudaMemcpy2D(
            source_type=MEMORYTYPE_UNIFIED, source_device=source.data_ptr(), source_pitch=source.stride(1) * item,
            target_type=MEMORYTYPE_UNIFIED, target_device=target.data_ptr(), target_pitch=target.stride(1) * item,
            width=heads * channels * item, height=length,
        )  # fmt: skip
        _check(_driver().cuMemcpy2DAsync_v2(ctypes.byref(copy), _stream(self._copy_stream)))

    def signal(self, rank: int, channel: int) -> None:
        """See PeerMemory."""
        self._signalled[rank, channel] += 1
        address, value = self._address(rank, self.rank, channel), _uint32(self._signalled[rank, channel])
        _check(_driver().cuStreamWriteValue32_v2(_stream(self._copy_stream), address, value, 0))

    def wait(self, rank: int, channel: int) -> None:
        """See PeerMemory."""
        self._wait_on(torch.cuda.current_stream(self.device), rank, channel)

    def copy_wait(self, rank: int, channel: int) -> None:
        """See PeerMemory."""
        self._wait_on(self._copy_stream, rank, channel)

    def copy_wait_compute(self) -> None:
        """See PeerMemory."""
        self._copy_stream.wait_stream(torch.cuda.current_stream(self.device))

    def wait_copies(self) -> None:
        """See PeerMemory."""
        torch.cuda.current_stream(self.device).wait_stream(self._copy_stream)

    def signal_count(self, rank: int, channel: int) -> int:
        """Return how often `rank` has signalled this rank on `channel` so far; the host waits for the value."""
        offset = self._size // SIGNAL_BYTES + rank * CHANNELS + channel
        return int(self.buffer(self.rank, offset, (1,), torch.int32))

    def _wait_on(self, stream: torch.cuda.Stream, rank: int, channel: int) -> None:
        self._waited[rank, channel] += 1
        address, value = self._address(self.rank, rank, channel), _uint32(self._waited[rank, channel])
        _check(_driver().cuStreamWaitValue32_v2(_stream(stream), address, value, WAIT_VALUE_GEQ))

    def _address(self, rank: int, sender: int, channel: int) -> ctypes.c_uint64:
        """Return the address of the signal that `sender` gives to `rank`."""
        return ctypes.c_uint64(self._signal_pads[rank] + (sender * CHANNELS + channel) * SIGNAL_BYTES)

    def _drop(self) -> None:
        torch.cuda.synchronize(self.device)
        self._symmetric = self._buffer = None
        self._size = 0


class _Trial:
    """Checks step by step that rows with a pitch, and signals, arrive intact from every rank.

    A machine may report peer access and lose what its GPUs write to each other (an IOMMU can cause this).
    """

    def __init__(self, memory: GpuPeerMemory) -> None:
        self._memory, self._others = memory, other_ranks(memory.ranks, memory.rank)
        self._sent = torch.arange(math.prod(TRIAL_SHAPE), dtype=torch.int32, device=memory.device).view(TRIAL_SHAPE)

    def prepare(self) -> bool:
        """Fill this rank's buffer with -1; return True."""
        self._memory.reserve(self._memory.ranks * self._sent.nbytes)
        self._received(self._memory.rank).fill_(-1)
        torch.cuda.synchronize(self._memory.device)
        return True

    def send(self) -> bool:
        """Send rows and a signal to all other ranks; return True."""
        self._memory.copy_wait_compute()
        for other in self._others:
            self._memory.copy(self._sent[:, :, 1:3], self._received(other)[self._memory.rank][:, :, 2:4])
            self._memory.signal(other, 0)
        torch.cuda.synchronize(self._memory.device)
        return True

    def check_received(self) -> bool:
        """Return whether the rows and the signals of all other ranks have arrived."""
        expected = torch.full_like(self._sent, -1)
        expected[:, :, 2:4] = self._sent[:, :, 1:3]
        own, count = self._received(self._memory.rank), self._memory.signal_count
        return all(torch.equal(own[other], expected) and count(other, 0) == 1 for other in self._others)

    def wait(self) -> bool:
        """Let the current stream wait for the signals; return True once it has continued."""
        for other in self._others:
            self._memory.wait(other, 0)
        torch.cuda.synchronize(self._memory.device)
        return True

    def _received(self, rank: int) -> Tensor:
        """Return what `rank` has received, `[sender, *TRIAL_SHAPE]`."""
        return self._memory.buffer(rank, 0, (self._memory.ranks, *TRIAL_SHAPE), self._sent.dtype)


def _succeeds(step: Callable[[], bool]) -> bool:
    """Return whether `step` returns True; log why not."""
    problem: object = "what they sent did not arrive"
    try:
        if step():
            return True
    except Exception as error:  # the driver and PyTorch's internals raise various exceptions
        problem = error
    log.warning("GPUs do not exchange by their copy engines: %s", problem)
    return False


def _stream(stream: torch.cuda.Stream) -> ctypes.c_void_p:
    return ctypes.c_void_p(stream.cuda_stream)


def _uint32(count: int) -> ctypes.c_uint32:
    """Return `count` modulo 2^32; the driver compares cyclically, by the sign of the difference."""
    return ctypes.c_uint32(count & 0xFFFFFFFF)


def _check(error: int) -> None:
    if error:
        raise RuntimeError(f"CUDA's driver refused a copy or a signal between GPUs (error {error}).")


def _has_peer_access(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return whether this rank's GPU can write to the memory of all others in `group`."""
    own = (socket.gethostname(), device.index if device.type == "cuda" else None)
    placed = all_gather_object(own, group)
    if any(host != own[0] or index is None for host, index in placed) or not uses_nccl(device):
        return False
    # Multicast is not needed here, and fails on machines that are not set up for it.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    with suppress(OSError, ImportError, AttributeError):
        from torch.distributed import _symmetric_memory  # noqa: F401

        _ = _driver().cuStreamWaitValue32_v2, _driver().cuStreamWriteValue32_v2
        return all(torch.cuda.can_device_access_peer(device, i) for _, i in placed if i != device.index)
    return False


@cache
def _driver() -> Any:
    """Load the CUDA driver library. Raises OSError if there is none."""
    return ctypes.CDLL("libcuda.so.1")
