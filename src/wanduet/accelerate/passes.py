"""How a transformer without memory becomes one that runs: a list of passes, each over the unchanged model.

Source of the idea: gpt-fast (meta device, quantise, load with assign, shard, compile). What a pass must know of the plan
stands in `LoadContext`; a new one (a merged LoRA) is a row of `PIPELINE`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wanduet.accelerate.formats import load_targets, set_format
from wanduet.accelerate.host_memory import HostMemory
from wanduet.accelerate.offload import allocate_streamed, stream_blocks
from wanduet.accelerate.packing import allocate_packed
from wanduet.kernels.dit.weight import Weight, WeightFormat
from wanduet.models.dit.model import WanTransformer


@dataclass(frozen=True, slots=True)
class LoadContext:
    """Where the transformer goes and in what dtype; how many blocks stay on the device, and what memory the others wait in.

    `fill` writes the weights into parameters and matrices that have their memory, by name. `format`: of the blocks'
    matrices, if they are not in `dtype`.
    """

    device: torch.device
    dtype: torch.dtype
    resident_blocks: int
    memory: HostMemory
    fill: Callable[[dict[str, Tensor | Weight]], None]
    format: WeightFormat | None = None


@dataclass(frozen=True, slots=True)
class Pass:
    """One step of loading. `transform` changes the model in place where `applies` says so."""

    name: str
    applies: Callable[[WanTransformer, LoadContext], bool]
    transform: Callable[[WanTransformer, LoadContext], object]


def _offloads(model: WanTransformer, context: LoadContext) -> bool:
    return context.resident_blocks < len(model.blocks)


def _set_format(model: WanTransformer, context: LoadContext) -> None:
    assert context.format is not None
    set_format(model, context.format)


PIPELINE = (
    Pass("set format", lambda model, context: context.format is not None, _set_format),
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
    Pass("load", lambda model, context: True, lambda model, context: context.fill(load_targets(model))),
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
