"""Collectives and point-to-point transfers that work with NCCL and with gloo.

NCCL moves GPU tensors directly. Without NCCL (Windows), gloo sends them through host memory. That is fast enough for
the few MB that guidance exchanges in a step, and too slow for sequence parallelism.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")


def uses_nccl(device: torch.device) -> bool:
    """Return whether ranks exchange tensors of this device by NCCL, without a copy to the host.

    A process group cannot answer this: its back end is named for each kind of device.
    """
    return device.type == "cuda" and dist.is_nccl_available()


def all_gather(x: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Return every rank's `x`, in rank order, on this rank's device. All shapes and dtypes must be equal.

    `group` defaults to all ranks.
    """
    own = _to_backend(x)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    return [other.to(x.device) for other in gathered]


def all_gather_object(item: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return every rank's `item`, in rank order. Items must be picklable. `group` defaults to all ranks."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, item, group=group)
    return gathered


def broadcast_(x: Tensor) -> None:
    """Overwrite `x` in place with rank 0's `x`, on all ranks."""
    own = _to_backend(x)
    dist.broadcast(own, src=0)
    if own is not x:
        x.copy_(own)


@dataclass(frozen=True, slots=True)
class PendingSend:
    """A tensor that is being sent to other ranks."""

    buffer: Tensor  # must stay alive until it has been sent
    works: tuple[dist.Work, ...]

    def wait(self) -> None:
        """Wait until the tensor has been sent; on a GPU the current stream waits, not the host."""
        for work in self.works:
            work.wait()


def isend(x: Tensor, *ranks: int) -> PendingSend:
    """Start to send a copy of `x` to `ranks`; `x` may be overwritten at once."""
    own = _to_backend(x.clone(memory_format=torch.contiguous_format))
    works = []
    for rank in ranks:
        work = dist.isend(own, rank)
        assert work is not None
        works.append(work)
    return PendingSend(own, tuple(works))


def recv(shape: Sequence[int], like: Tensor, rank: int) -> Tensor:
    """Receive a tensor of `shape` from `rank`, with the dtype and the device of `like`."""
    own = _to_backend(like.new_empty(shape))
    dist.recv(own, rank)
    return own.to(like.device)


def _to_backend(x: Tensor) -> Tensor:
    """Return `x` contiguous, and on the host where gloo has to carry it."""
    x = x.contiguous()
    return x.cpu() if x.is_cuda and not uses_nccl(x.device) else x
