"""Small exchanges between ranks that work with whatever backend there is.

NCCL moves GPU tensors. Where it is missing (Windows), gloo carries them through host memory: fine for the few
MB a step of guidance, too slow for a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

Said = TypeVar("Said")


def goes_directly(device: torch.device) -> bool:
    """Whether ranks exchange a GPU's tensors without the host. Not to be asked of a group: its back end has a name for
    each kind of device."""
    return device.type == "cuda" and dist.is_nccl_available()


def gather(x: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Every rank's `x`, in their order; shapes must agree. Of all ranks, unless a group of them is given."""
    own = _carried(x)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return [part.to(x.device) for part in parts]


def told(mine: Said, group: dist.ProcessGroup | None = None) -> list[Said]:
    """What every rank says, something picklable, in their order. All ranks, unless a group of them is given."""
    said: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, mine, group=group)
    return said


def take_from_first(x: Tensor) -> None:
    """Overwrite `x` with rank 0's."""
    own = _carried(x)
    dist.broadcast(own, src=0)
    if own is not x:
        x.copy_(own)


@dataclass(frozen=True, slots=True)
class Sending:
    """A tensor under way to other ranks."""

    sent: Tensor  # kept alive until it has arrived
    works: tuple[dist.Work, ...]

    def wait(self) -> None:
        """Until it is sent; on a GPU the current stream waits, not the host."""
        for work in self.works:
            work.wait()


def send(x: Tensor, *ranks: int) -> Sending:
    """Begin to send a copy of `x`, which may be overwritten at once."""
    own = _carried(x.clone(memory_format=torch.contiguous_format))
    works = []
    for rank in ranks:
        work = dist.isend(own, rank)
        assert work is not None
        works.append(work)
    return Sending(own, tuple(works))


def receive(shape: Sequence[int], like: Tensor, rank: int) -> Tensor:
    """What that rank sends: a tensor of this shape, with the dtype and device of `like`."""
    own = _carried(like.new_empty(shape))
    dist.recv(own, rank)
    return own.to(like.device)


def _carried(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x.cpu() if x.is_cuda and not goes_directly(x.device) else x
