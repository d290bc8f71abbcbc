"""The process groups of CFG, ring and Ulysses parallelism: a grid of ranks, `cfg x ring x ulysses`.

`cfg` ranks take one prompt each and exchange a velocity in every step. `ring` and `ulysses` ranks share one sequence of
tokens and exchange keys and values, or heads, in every block. Neighbouring ranks, which usually have the fastest link,
lie along `ulysses`, which exchanges most; the most distant ones along `cfg`.
"""

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import torch
from torch import Tensor
from torch import distributed as dist

from wanduet.distributed.p2p.copies import GpuPeerMemory
from wanduet.distributed.p2p.memory import PeerMemory
from wanduet.errors import ConfigError

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Layout:
    """The number of ranks along each axis: the degrees of CFG, ring and Ulysses parallelism."""

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1

    def __post_init__(self) -> None:
        """Check the degrees. Raises ConfigError for one out of range."""
        if self.cfg not in (1, 2) or self.ring < 1 or self.ulysses < 1:
            raise ConfigError(f"{self} is no layout: cfg is 1 or 2, ring and ulysses are at least 1.")

    @property
    def sequence(self) -> int:
        """The number of ranks that share one sequence."""
        return self.ring * self.ulysses

    @property
    def world_size(self) -> int:
        """The number of all ranks."""
        return self.cfg * self.sequence


ONE_DEVICE = Layout()


def choose_layout(world_size: int, num_heads: int, uses_guidance: bool) -> Layout:
    """Return the layout that exchanges least for `world_size` ranks, one for each device.

    With guidance and an even number of ranks, half of them take the negative prompt: this exchanges a few MB in a step.
    The ranks of one prompt share the sequence by Ulysses, as far as its degree divides `num_heads`; this exchanges
    `4 / degree` of a sequence of hidden states in a block. The remaining factor goes to the ring, which exchanges keys
    and values of the whole sequence in a block and works with any number of heads. (Two GPUs with peer access exchange
    keys and values along the Ulysses axis too, which is the same amount: p2p/exchange.py.)

    Raises ConfigError for a number of ranks or heads below 1.
    """
    if world_size < 1 or num_heads < 1:
        raise ConfigError(f"{world_size} ranks cannot share {num_heads} heads.")
    cfg = 2 if uses_guidance and world_size % 2 == 0 else 1
    sequence = world_size // cfg
    ulysses = math.gcd(sequence, num_heads)
    return Layout(cfg, sequence // ulysses, ulysses)


def one_sequence(layout: Layout, num_heads: int) -> Layout:
    """Return the layout in which all ranks of another one share the sequence of one prompt."""
    return choose_layout(layout.world_size, num_heads, uses_guidance=False)


@dataclass(frozen=True, slots=True)
class Mesh:
    """This rank's process group along each axis; `sequence` is the whole plane `ring x ulysses`.

    Rank `r` of `sequence` has the coordinates `(r // ulysses, r % ulysses)`. Rank 0 of `cfg` takes the prompt, rank 1
    the negative prompt (see sampling/guidance.py).
    """

    layout: Layout
    cfg: dist.ProcessGroup
    sequence: dist.ProcessGroup
    ring: dist.ProcessGroup
    ulysses: dist.ProcessGroup
    peer_memory: PeerMemory | None = None  # of `ulysses`; None where its ranks cannot write to each other's memory

    @classmethod
    def create(cls, layout: Layout, timeout_s: float, device: torch.device = CPU) -> Self:
        """Create the groups from the initialised default process group. Every rank must call this, with its device.

        `timeout_s` is the longest time that a collective may take, in seconds. Raises ConfigError if the number of
        ranks is not the layout's.
        """
        if dist.get_world_size() != layout.world_size:
            raise ConfigError(f"{layout} needs {layout.world_size} ranks; there are {dist.get_world_size()}.")
        assert dist.group.WORLD is not None
        plane = torch.arange(layout.world_size).view(layout.cfg, layout.sequence)
        grid = plane.view(layout.cfg, layout.ring, layout.ulysses)
        # Not init_device_mesh: its groups ignore the default group's timeout, and it creates one group for each axis
        # even where two axes have the same ranks. A NCCL communicator takes some hundred MB of GPU memory.
        created = {_rank_lists(plane.view(1, -1)): dist.group.WORLD}
        groups = []
        for axis in (plane.t(), plane, grid.movedim(1, -1), grid):
            ranks = _rank_lists(axis)
            if ranks not in created:
                timeout = timedelta(seconds=timeout_s)
                created[ranks], _ = dist.new_subgroups_by_enumeration([list(row) for row in ranks], timeout=timeout)
            groups.append(created[ranks])
        cfg, sequence, ring, ulysses = groups
        return cls(layout, cfg, sequence, ring, ulysses, GpuPeerMemory.from_group(ulysses, device))

    @property
    def cfg_rank(self) -> int:
        """0 for the prompt, 1 for the negative prompt."""
        return dist.get_rank(self.cfg)

    @property
    def sequence_rank(self) -> int:
        """The index of this rank's part of the sequence."""
        return dist.get_rank(self.sequence)


def _rank_lists(ranks: Tensor) -> tuple[tuple[int, ...], ...]:
    """Return the ranks of each group along the last axis."""
    return tuple(tuple(row) for row in ranks.reshape(-1, ranks.shape[-1]).tolist())
