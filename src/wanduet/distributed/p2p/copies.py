"""Memory that the GPUs of one machine share, and copies into it by their copy engines.

PyTorch's symmetric memory maps a buffer of every rank into all of them. CUDA's driver copies rows of any length and
pitch, and writes and awaits words, for which PyTorch would start kernels: those wait for a multiprocessor, which an
attention gives back when it is over. So a rank that attends could not say that its keys have arrived, and the other one
attended after it, not beside it (two H100, 480p: 281 ms a step, with words by the driver 234).
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

from wanduet.distributed.collectives import goes_directly, told
from wanduet.distributed.split import others

log = logging.getLogger(__name__)

UNIFIED = 4  # CU_MEMORYTYPE_UNIFIED: an address says itself whose memory it is
AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ
CHANNELS, WORD = 16, 4  # of each pair of ranks; bytes
# What a new buffer is tried with: rows of some heads, among others.
TRIED = (1, 67, 6, 128)


class _Copy2D(ctypes.Structure):
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


class GpuPeers:
    """A `PeerMemory` of the GPUs of a group, one a rank, that reach each other."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """Made by `of_group`."""
        self._group, self.device = group, device
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self._copies = torch.cuda.Stream(device)
        self._size = 0
        self._shared: Any = None
        self._buffer: Tensor | None = None  # which `_shared` does not keep
        self._words: list[int] = []  # where each rank's begin
        # A word is a number that grows: how often it was told, how often heard, by rank and channel.
        self._told: Counter[tuple[int, int]] = Counter()
        self._heard: Counter[tuple[int, int]] = Counter()

    @classmethod
    def of_group(cls, group: dist.ProcessGroup, device: torch.device) -> Self | None:
        """For the ranks of a group, who must all ask; None for all of them where one cannot reach another, or where
        what arrives is not what was sent."""
        if dist.get_world_size(group) == 1 or not all(told(_reachable(group, device), group)):
            return None
        peers = cls(group, device)
        trial = _Trial(peers)
        # All have done a step before any takes the next: nothing waits on a GPU for what may never arrive.
        for step in (trial.prepare, trial.send, trial.see, trial.hear):
            if not all(told(_works(step), group)):
                return None
        peers._drop()  # the next to reserve memory gets a new buffer, about which nothing has been said
        return peers

    def reserve(self, size: int) -> bool:
        """See PeerMemory."""
        if size <= self._size:
            return False
        from torch.distributed import _symmetric_memory as symmetric

        self._drop()
        before, words = -(-size // WORD), self.ranks * CHANNELS
        self._buffer = symmetric.empty((before + words) * WORD, dtype=torch.uint8, device=self.device)
        self._buffer[before * WORD :].zero_()
        torch.cuda.synchronize(self.device)  # all come to the rendezvous with words that are zero
        self._shared = symmetric.rendezvous(self._buffer, self._group)
        self._words = [self.on(rank, before, (words,), torch.int32).data_ptr() for rank in range(self.ranks)]
        self._told.clear()
        self._heard.clear()
        self._size = before * WORD
        return True

    def on(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See PeerMemory."""
        view: Tensor = self._shared.get_buffer(rank, shape, dtype, offset)
        return view

    def follow(self) -> None:
        """See PeerMemory."""
        self._copies.wait_stream(torch.cuda.current_stream(self.device))

    def copy(self, source: Tensor, target: Tensor) -> None:
        """See PeerMemory."""
        if not source.numel():
            return
        _, length, heads, channels = source.shape
        item = source.itemsize
        if any(x.stride(3) != 1 or (heads > 1 and x.stride(2) != channels) for x in (source, target)):
            raise ValueError("Copies between GPUs need heads that lie side by side in memory.")
        copy = _Copy2D(
            source_type=UNIFIED, source_device=source.data_ptr(), source_pitch=source.stride(1) * item,
            target_type=UNIFIED, target_device=target.data_ptr(), target_pitch=target.stride(1) * item,
            width=heads * channels * item, height=length,
        )  # fmt: skip
        _check(_driver().cuMemcpy2DAsync_v2(ctypes.byref(copy), _stream(self._copies)))

    def tell(self, rank: int, channel: int) -> None:
        """See PeerMemory."""
        self._told[rank, channel] += 1
        place = self._word(rank, self.rank, channel)
        _check(_driver().cuStreamWriteValue32_v2(_stream(self._copies), place, _number(self._told[rank, channel]), 0))

    def hear(self, rank: int, channel: int) -> None:
        """See PeerMemory."""
        self._await(torch.cuda.current_stream(self.device), rank, channel)

    def heed(self, rank: int, channel: int) -> None:
        """See PeerMemory."""
        self._await(self._copies, rank, channel)

    def _await(self, stream: torch.cuda.Stream, rank: int, channel: int) -> None:
        self._heard[rank, channel] += 1
        place = self._word(self.rank, rank, channel)
        _check(_driver().cuStreamWaitValue32_v2(_stream(stream), place, _number(self._heard[rank, channel]), AT_LEAST))

    def said(self, rank: int, channel: int) -> int:
        """How often a rank has told this one on a channel until now; the host waits for the answer."""
        place = self.on(self.rank, self._size // WORD + rank * CHANNELS + channel, (1,), torch.int32)
        return int(place)

    def _word(self, rank: int, sender: int, channel: int) -> ctypes.c_uint64:
        """The address of what `sender` tells a rank on a channel."""
        return ctypes.c_uint64(self._words[rank] + (sender * CHANNELS + channel) * WORD)

    def join(self) -> None:
        """See PeerMemory."""
        torch.cuda.current_stream(self.device).wait_stream(self._copies)

    def _drop(self) -> None:
        torch.cuda.synchronize(self.device)
        self._shared = self._buffer = None
        self._size = 0


class _Trial:
    """Whether rows between others, and words, arrive where they should, from every rank; step by step.

    A machine may promise that its GPUs reach each other and lose what they write (an IOMMU does).
    """

    def __init__(self, peers: GpuPeers) -> None:
        self._peers, self._others = peers, others(peers.ranks, peers.rank)
        self._sent = torch.arange(math.prod(TRIED), dtype=torch.int32, device=peers.device).view(TRIED)

    def prepare(self) -> bool:
        """Buffers with nothing in them."""
        self._peers.reserve(self._peers.ranks * self._sent.nbytes)
        self._place(self._peers.rank).fill_(-1)
        torch.cuda.synchronize(self._peers.device)
        return True

    def send(self) -> bool:
        """Rows and a word to all others."""
        self._peers.follow()
        for other in self._others:
            self._peers.copy(self._sent[:, :, 1:3], self._place(other)[self._peers.rank][:, :, 2:4])
            self._peers.tell(other, 0)
        torch.cuda.synchronize(self._peers.device)
        return True

    def see(self) -> bool:
        """Whether both have come from all others."""
        expected = torch.full_like(self._sent, -1)
        expected[:, :, 2:4] = self._sent[:, :, 1:3]
        own = self._place(self._peers.rank)
        return all(torch.equal(own[other], expected) and self._peers.said(other, 0) == 1 for other in self._others)

    def hear(self) -> bool:
        """Whether a stream that waits for the words goes on."""
        for other in self._others:
            self._peers.hear(other, 0)
        torch.cuda.synchronize(self._peers.device)
        return True

    def _place(self, rank: int) -> Tensor:
        return self._peers.on(rank, 0, (self._peers.ranks, *TRIED), self._sent.dtype)


def _works(step: Callable[[], bool]) -> bool:
    problem: object = "what they sent did not arrive"
    try:
        if step():
            return True
    except Exception as error:  # whatever a driver or PyTorch's own code raises
        problem = error
    log.warning("GPUs do not exchange by their copy engines: %s", problem)
    return False


def _stream(stream: torch.cuda.Stream) -> ctypes.c_void_p:
    return ctypes.c_void_p(stream.cuda_stream)


def _number(count: int) -> ctypes.c_uint32:
    """Compared cyclically, by the sign of the difference."""
    return ctypes.c_uint32(count & 0xFFFFFFFF)


def _check(error: int) -> None:
    if error:
        raise RuntimeError(f"CUDA's driver refused a copy or a word between GPUs (error {error}).")


def _reachable(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether this rank's GPU can write to those of all others."""
    mine = (socket.gethostname(), device.index if device.type == "cuda" else None)
    machines = told(mine, group)
    if any(host != mine[0] or index is None for host, index in machines) or not goes_directly(device):
        return False
    # Multicast has no use here, and is what fails where a machine is not set up for it.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    with suppress(OSError, ImportError, AttributeError):
        from torch.distributed import _symmetric_memory  # noqa: F401

        _ = _driver().cuStreamWaitValue32_v2, _driver().cuStreamWriteValue32_v2
        return all(torch.cuda.can_device_access_peer(device, i) for _, i in machines if i != device.index)
    return False


@cache
def _driver() -> Any:
    """CUDA's driver. Raises OSError where there is none."""
    return ctypes.CDLL("libcuda.so.1")
