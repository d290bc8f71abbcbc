"""Packs a block's large parameters into one flat buffer, of which they become views.

Then q, k and v are computed by one matrix product (their weights are adjacent), and one copy moves a block between host
and device. Names and `state_dict` stay the same. No other state is kept: whether a block is packed is determined from
its parameters' addresses.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from wanduet.models.dit.model import Block, WanTransformer

# Offsets are multiples of this many elements: 256 bytes in bf16, as cudaMalloc aligns.
ALIGNMENT = 128
# Parameters without gaps between them, in this order.
ADJACENT = (
    tuple(f"attn1.to_{part}.weight" for part in "qkv"),
    tuple(f"attn1.to_{part}.bias" for part in "qkv"),
)

Allocate = Callable[[int, int, torch.dtype], Tensor]
"""Allocates a flat buffer from (block index, number of elements, dtype)."""


@dataclass(frozen=True, slots=True)
class Part:
    """The place of one parameter in a block's buffer; `offset` in elements."""

    name: str
    offset: int
    shape: torch.Size


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """The places of a block's large parameters in its buffer of `size` elements."""

    parts: tuple[Part, ...]
    size: int

    @classmethod
    def of(cls, block: Block) -> "BlockLayout":
        """The layout of a block, which may be on any device, including meta."""
        shapes = {name: p.shape for name, p in block.named_parameters() if is_large(name)}
        others = [(name,) for name in shapes if not any(name in group for group in ADJACENT)]
        parts: list[Part] = []
        offset = 0
        for group in (*ADJACENT, *others):
            offset = -(-offset // ALIGNMENT) * ALIGNMENT
            for name in group:
                parts.append(Part(name, offset, shapes[name]))
                offset += shapes[name].numel()
        return cls(tuple(parts), offset)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parameters' values as views of a flat buffer `[size]`, in the order of `parts`."""
        return [flat[part.offset : part.offset + part.shape.numel()].view(part.shape) for part in self.parts]


def is_large(name: str) -> bool:
    """Whether a block's parameter belongs to a large product, and therefore to the packed buffer."""
    return ".to_" in name or name.startswith("ffn.")


def large_parameters(block: Block, layout: BlockLayout) -> list[nn.Parameter]:
    """A block's large parameters, in the order of `layout.parts`."""
    named = dict(block.named_parameters())
    return [named[part.name] for part in layout.parts]


def packed_buffer(block: Block) -> Tensor | None:
    """The flat buffer `[size]` of which a block's large parameters are views; None if they are not packed."""
    layout = BlockLayout.of(block)
    parameters = large_parameters(block, layout)
    first = parameters[0].data
    storage = first.untyped_storage()
    if storage.nbytes() < layout.size * first.itemsize:
        return None
    flat: Tensor = torch.empty(0, dtype=first.dtype, device=first.device)
    flat.set_(storage, 0, (layout.size,), (1,))
    for parameter, view in zip(parameters, layout.views(flat), strict=True):
        if parameter.data_ptr() != view.data_ptr() or parameter.dtype != view.dtype:
            return None
    return flat


def pack_block(block: Block, flat: Tensor) -> None:
    """Copy a block's large parameters into `flat` `[size]` and make them views of it."""
    layout = BlockLayout.of(block)
    for parameter, view in zip(large_parameters(block, layout), layout.views(flat), strict=True):
        view.copy_(parameter.data)
        parameter.data = view


@torch.no_grad()
def pack_blocks(transformer: WanTransformer) -> None:
    """Pack every block on its device, one after the other, so that only one block's weights exist twice."""
    for block in _blocks(transformer):
        if packed_buffer(block) is None:
            weight = block.attn1.to_q.weight
            flat = torch.empty(BlockLayout.of(block).size, dtype=weight.dtype, device=weight.device)
            pack_block(block, flat)


@torch.no_grad()
def move_packed(transformer: WanTransformer, device: torch.device) -> None:
    """Move a transformer to a device and pack its blocks. (`.to` would give each parameter memory of its own.)"""
    for block in _blocks(transformer):
        flat = packed_buffer(block)
        weight = block.attn1.to_q.weight
        if flat is None or flat.device != device:
            size = BlockLayout.of(block).size
            pack_block(block, torch.empty(size, dtype=weight.dtype, device=device))
    transformer.to(device)  # the remaining parameters; those already there are not copied


def allocate_packed(
    transformer: WanTransformer, device: torch.device, dtype: torch.dtype, allocate: Allocate | None = None
) -> None:
    """Give a transformer on the meta device uninitialised memory, with packed blocks.

    A loader then fills it, tensor by tensor, by `parameter.data.copy_(tensor)`. Large products get `dtype`, the rest
    float32 (`WanTransformer.parameter_dtype`). `allocate` allocates each block's buffer, by default on `device`.
    """
    for index, block in enumerate(_blocks(transformer)):
        layout = BlockLayout.of(block)
        if allocate is None:
            flat = torch.empty(layout.size, dtype=dtype, device=device)
        else:
            flat = allocate(index, layout.size, dtype)
        for part, view in zip(layout.parts, layout.views(flat), strict=True):
            _replace(block, part.name, view)
    for name, parameter in list(transformer.named_parameters()):
        if parameter.is_meta:
            stored = WanTransformer.parameter_dtype(name, dtype)
            _replace(transformer, name, torch.empty(parameter.shape, dtype=stored, device=device))


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter, because a meta parameter's data cannot be set."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    setattr(owner, leaf, nn.Parameter(value, requires_grad=owner.get_parameter(leaf).requires_grad))


def _blocks(transformer: WanTransformer) -> list[Block]:
    return [cast(Block, block) for block in transformer.blocks]
