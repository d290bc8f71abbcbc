"""How a transformer without memory becomes one that runs: a list of passes, each over the unchanged model.

Source of the idea: gpt-fast (meta device, quantise, load with assign, shard, compile). What a pass must know of the plan
stands in `LoadContext`; a new one (a quantised format, a merged LoRA) is a row of `PIPELINE`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from wanduet.accelerate.host_memory import HostMemory
from wanduet.accelerate.offload import allocate_streamed, stream_blocks
from wanduet.accelerate.packing import allocate_packed
from wanduet.models.dit.model import WanTransformer


@dataclass(frozen=True, slots=True)
class LoadContext:
    """Where the transformer goes and in what dtype; how many blocks stay on the device, and what memory the others wait in.

    `fill` writes the weights into parameters that have their memory, by name.
    """

    device: torch.device
    dtype: torch.dtype
    resident_blocks: int
    memory: HostMemory
    fill: Callable[[dict[str, nn.Parameter]], None]


@dataclass(frozen=True, slots=True)
class Pass:
    """One step of loading. `transform` changes the model in place where `applies` says so."""

    name: str
    applies: Callable[[WanTransformer, LoadContext], bool]
    transform: Callable[[WanTransformer, LoadContext], object]


def _offloads(model: WanTransformer, context: LoadContext) -> bool:
    return context.resident_blocks < len(model.blocks)


PIPELINE = (
    Pass(
        "allocate packed",  # q, k and v adjacent in memory, so that they are one product
        lambda model, context: not _offloads(model, context),
        lambda model, context: allocate_packed(model, context.device, context.dtype),
    ),
    Pass(
        "allocate streamed",  # the same, with the blocks that are offloaded in host memory
        _offloads,
        lambda model, context: allocate_streamed(
            model, context.device, context.dtype, context.resident_blocks, context.memory
        ),
    ),
    Pass("load", lambda model, context: True, lambda model, context: context.fill(dict(model.named_parameters()))),
    Pass(
        "offload",
        _offloads,
        lambda model, context: stream_blocks(model, context.device, context.resident_blocks, context.memory),
    ),
)


def run_passes(model: WanTransformer, context: LoadContext) -> None:
    """Run all passes that apply, in order, on a transformer on the meta device. Raises what `context.fill` raises."""
    for one in PIPELINE:
        if one.applies(model, context):
            one.transform(model, context)
