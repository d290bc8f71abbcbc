"""Small exchanges between ranks that work with whatever backend there is.

NCCL moves GPU tensors. Where it is missing (Windows), gloo carries them through host memory: fine for the few
MB a step of guidance, too slow for a sequence.
"""

import torch
from torch import Tensor
from torch import distributed as dist


def gather(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Every rank's `x`, in their order; shapes must agree."""
    own = _carried(x)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return [part.to(x.device) for part in parts]


def take_from_first(x: Tensor) -> None:
    """Overwrite `x` with rank 0's."""
    own = _carried(x)
    dist.broadcast(own, src=0)
    if own is not x:
        x.copy_(own)


def _carried(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x.cpu() if x.is_cuda and not dist.is_nccl_available() else x
