"""A transformer that is loaded, and what was chosen for it; it can make room on its device, and give all memory back."""

import time
from dataclasses import dataclass, field, replace

import torch

from wanduet.accelerate.host_memory import HostMemory
from wanduet.accelerate.offload import BlockStream, stream_blocks
from wanduet.kernels.attention.backends import AttentionLseFn
from wanduet.kernels.attention.choose import Choice, Shape
from wanduet.kernels.dit.plain import Kernels
from wanduet.kernels.select import without
from wanduet.models.dit.model import WanTransformer
from wanduet.runtime.release import drop_memory

SWAPPED_OUT = -1  # resident blocks of a transformer that made room


@dataclass(slots=True)
class LoadedTransformer:
    """The loaded transformer, and the plan's part that decided how it was loaded."""

    transformer: WanTransformer
    device: torch.device
    dtype: torch.dtype
    resident_blocks: int
    memory: HostMemory  # where blocks wait that are not on the device
    attention: str = ""
    attention_lse: AttentionLseFn | None = None
    chosen: tuple[Shape, Kernels, Choice] | None = None  # for the last job's length of sequence
    loaded_at: float = field(default_factory=time.perf_counter)
    fitted_at: float = 0.0  # when that was chosen

    def attend_with(self, choice: Choice) -> None:
        """Use that attention from the next forward on."""
        self.attention, self.attention_lse = choice.name, choice.fn_with_lse
        self.transformer.runtime = replace(self.transformer.runtime, attention=choice.fn)

    def without_kernel(self, operation: str) -> None:
        """Compute with an operation's plain form from the next forward on, in later jobs too."""
        kernels = without(self.transformer.runtime.kernels, operation, self.device)
        self.transformer.runtime = replace(self.transformer.runtime, kernels=kernels)
        if self.chosen is not None:
            shape, _, choice = self.chosen
            self.chosen = (shape, kernels, choice)

    def restream(self, resident_blocks: int) -> None:
        """Keep so many blocks on the device."""
        stream_blocks(self.transformer, self.device, resident_blocks, self.memory)
        self.resident_blocks = resident_blocks

    def swap_out(self) -> None:
        """Take all blocks off the device, and what they come through: `restream` before it runs again."""
        stream_blocks(self.transformer, self.device, 0, self.memory, num_buffers=0)
        self.resident_blocks = SWAPPED_OUT

    def free(self) -> None:
        """Give all memory back, whoever may still refer to the transformer: it cannot run any more."""
        if isinstance(self.transformer.fetch_blocks, BlockStream):
            self.transformer.fetch_blocks.close()
        drop_memory(self.transformer)
        self.memory.close()
