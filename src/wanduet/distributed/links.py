"""How the devices of a group reach each other, and the NCCL setting that this requires."""

import os
from collections.abc import Sequence
from itertools import permutations
from typing import Literal

import torch

from wanduet.distributed.collectives import uses_nccl
from wanduet.distributed.mesh import Layout

Link = Literal["direct", "host", "gloo"]
"""direct: GPUs write to each other's memory (P2P), or all ranks are CPUs, which share one memory. host: NCCL copies
through host memory. gloo: there is no NCCL, as on Windows; tensors are copied to the host and sent through sockets."""


def link_between(devices: Sequence[torch.device]) -> Link:
    """Return the link between devices of one machine, as reported by the driver."""
    gpus = [device for device in devices if device.type == "cuda"]
    if not gpus:
        return "direct"
    if len(gpus) < len(devices) or not uses_nccl(gpus[0]):
        return "gloo"
    pairs = permutations(sorted({device.index or 0 for device in gpus}), 2)
    return "direct" if all(torch.cuda.can_device_access_peer(one, other) for one, other in pairs) else "host"


def configure_nccl(link: Link) -> None:
    """Disable NCCL's P2P transport in this process where `link` is "host". Call this before NCCL is initialised.

    A value of NCCL_P2P_DISABLE that the user has set stays.
    """
    if link == "host":
        os.environ.setdefault("NCCL_P2P_DISABLE", "1")


def attention_comm_bytes(layout: Layout, tokens: int, dim: int, itemsize: int) -> int:
    """Return the bytes that each rank sends by collectives for one attention.

    The sequence has `tokens` tokens of `dim` values of `itemsize` bytes. Along `ulysses` a rank sends q, k, v and the
    result; along `ring` it sends k and v to every other rank.
    """
    part = tokens * dim * itemsize / layout.sequence
    return int(part * (4 * (layout.ulysses - 1) / layout.ulysses + 2 * (layout.ring - 1)))
