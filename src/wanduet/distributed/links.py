"""How the devices of ranks are joined, and NCCL kept from a way that does not work there."""

import os
from collections.abc import Sequence
from itertools import permutations
from typing import Literal

import torch

from wanduet.distributed.collectives import goes_directly
from wanduet.distributed.mesh import Layout

Link = Literal["direct", "host", "gloo"]
"""direct: GPUs write to each other's memory, or all ranks are CPUs, which share one. host: NCCL carries everything through
the host's memory. gloo: without NCCL, as on Windows, everything is copied to the host and goes through sockets."""


def link_between(devices: Sequence[torch.device]) -> Link:
    """What joins devices of one machine, as far as their driver says."""
    gpus = [device for device in devices if device.type == "cuda"]
    if not gpus:
        return "direct"
    if len(gpus) < len(devices) or not goes_directly(gpus[0]):
        return "gloo"
    pairs = permutations(sorted({device.index or 0 for device in gpus}), 2)
    return "direct" if all(torch.cuda.can_device_access_peer(one, other) for one, other in pairs) else "host"


def keep_nccl_to(link: Link) -> None:
    """Let NCCL in this process go that way, unless somebody has chosen; it must not have begun."""
    if link == "host":
        os.environ.setdefault("NCCL_P2P_DISABLE", "1")


def attention_bytes(layout: Layout, tokens: int, dim: int, item: int) -> int:
    """What each rank sends by collectives for one attention over a sequence of so many tokens of `dim` values of `item`
    bytes: queries, keys, values and results along `ulysses`; keys and values to all others of its `ring`."""
    part = tokens * dim * item / layout.sequence
    return int(part * (4 * (layout.ulysses - 1) / layout.ulysses + 2 * (layout.ring - 1)))
