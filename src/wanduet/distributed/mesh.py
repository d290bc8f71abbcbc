"""Which ranks work together: a grid of processes, `cfg x ring x ulysses`.

`cfg` ranks take one prompt each and exchange a velocity a step; `ring` and `ulysses` ranks share one
sequence of tokens and exchange keys, values or heads in every block. Neighbouring ranks, which tend to
have the fastest link, are placed along `ulysses`, where most is exchanged; the farthest along `cfg`.
"""

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import torch
from torch import Tensor
from torch import distributed as dist

from wanduet.distributed.p2p.copies import GpuPeers
from wanduet.distributed.p2p.memory import PeerMemory
from wanduet.errors import ConfigError

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Layout:
    """How many ranks stand along each axis."""

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1

    def __post_init__(self) -> None:
        """Raises ConfigError for a degree that cannot be."""
        if self.cfg not in (1, 2) or self.ring < 1 or self.ulysses < 1:
            raise ConfigError(f"{self} is no layout: cfg is 1 or 2, ring and ulysses are at least 1.")

    @property
    def sequence(self) -> int:
        """How many ranks share one sequence."""
        return self.ring * self.ulysses

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self.cfg * self.sequence


ONE_DEVICE = Layout()


def choose_layout(world_size: int, num_heads: int, uses_guidance: bool) -> Layout:
    """The layout that exchanges least for a number of ranks, one a device.

    With guidance and an even number of ranks, half of them take the negative prompt: a few MB a step.
    The others share the sequence by heads (Ulysses) as far as the heads divide, which exchanges
    `4 / degree` of a sequence of hidden states a block; what is left goes to the ring, which exchanges
    keys and values of the whole sequence a block but asks nothing of the heads. (Two GPUs that write to each
    other's memory send keys and values along the Ulysses axis too, which is as much: p2p/exchange.py.)

    Raises ConfigError for a number of ranks or heads below 1.
    """
    if world_size < 1 or num_heads < 1:
        raise ConfigError(f"{world_size} ranks cannot share {num_heads} heads.")
    cfg = 2 if uses_guidance and world_size % 2 == 0 else 1
    sequence = world_size // cfg
    ulysses = math.gcd(sequence, num_heads)
    return Layout(cfg, sequence // ulysses, ulysses)


@dataclass(frozen=True, slots=True)
class Mesh:
    """This rank's groups along each axis; `sequence` is the whole plane `ring x ulysses`.

    Within `sequence`, rank `r` stands at `(r // ulysses, r % ulysses)`. Within `cfg`, rank 0 takes the
    prompt and rank 1 the negative prompt (see sampling/guidance.py).
    """

    layout: Layout
    cfg: dist.ProcessGroup
    sequence: dist.ProcessGroup
    ring: dist.ProcessGroup
    ulysses: dist.ProcessGroup
    peers: PeerMemory | None = None  # of `ulysses`, where its ranks can write to each other's memory

    @classmethod
    def create(cls, layout: Layout, timeout_s: float, device: torch.device = CPU) -> Self:
        """Arrange all ranks of the initialised default process group; every rank must call this, with its device.

        `timeout_s` is how long a collective may take. Raises ConfigError if the number of ranks is not the
        layout's.
        """
        if dist.get_world_size() != layout.world_size:
            raise ConfigError(f"{layout} needs {layout.world_size} ranks; there are {dist.get_world_size()}.")
        assert dist.group.WORLD is not None
        plane = torch.arange(layout.world_size).view(layout.cfg, layout.sequence)
        grid = plane.view(layout.cfg, layout.ring, layout.ulysses)
        # Not init_device_mesh: its groups ignore the default group's timeout, and it makes one for each axis
        # where those of equal ranks can be one. A NCCL communicator holds some hundred MB of GPU memory.
        made = {_rows(plane.view(1, -1)): dist.group.WORLD}
        groups = []
        for axis in (plane.t(), plane, grid.movedim(1, -1), grid):
            ranks = _rows(axis)
            if ranks not in made:
                timeout = timedelta(seconds=timeout_s)
                made[ranks], _ = dist.new_subgroups_by_enumeration([list(row) for row in ranks], timeout=timeout)
            groups.append(made[ranks])
        cfg, sequence, ring, ulysses = groups
        return cls(layout, cfg, sequence, ring, ulysses, GpuPeers.of_group(ulysses, device))

    @property
    def cfg_rank(self) -> int:
        """0 for the prompt, 1 for the negative prompt."""
        return dist.get_rank(self.cfg)

    @property
    def sequence_rank(self) -> int:
        """Which part of the sequence this rank holds."""
        return dist.get_rank(self.sequence)


def _rows(ranks: Tensor) -> tuple[tuple[int, ...], ...]:
    """Groups of ranks along the last axis."""
    return tuple(tuple(row) for row in ranks.reshape(-1, ranks.shape[-1]).tolist())
