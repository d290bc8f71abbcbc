"""A block's large parameters as views of one flat buffer.

Two things come of it: q, k and v are one matrix product (their weights lie side by side), and a block
moves between host and device as one copy. Names and `state_dict` stay the same. Nothing is remembered
about it: whether a block is packed is read off its parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from wanduet.models.dit.model import Block, WanTransformer

# Offsets are multiples of this many elements: 256 bytes in bf16, as cudaMalloc aligns.
ALIGNMENT = 128
# Side by side, in this order.
TOGETHER = (
    tuple(f"attn1.to_{part}.weight" for part in "qkv"),
    tuple(f"attn1.to_{part}.bias" for part in "qkv"),
)

Allocate = Callable[[int, int, torch.dtype], Tensor]
"""(block's index, elements, dtype) to a flat buffer."""


@dataclass(frozen=True, slots=True)
class Part:
    """Where one parameter of a block lies in the buffer; `offset` in elements."""

    name: str
    offset: int
    shape: torch.Size


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Where all large parameters of a block lie; `size` in elements."""

    parts: tuple[Part, ...]
    size: int

    @classmethod
    def of(cls, block: Block) -> "BlockLayout":
        """The layout for a block, on whatever device it is (also meta)."""
        shapes = {name: p.shape for name, p in block.named_parameters() if is_large(name)}
        alone = [(name,) for name in shapes if not any(name in group for group in TOGETHER)]
        parts: list[Part] = []
        offset = 0
        for group in (*TOGETHER, *alone):
            offset = -(-offset // ALIGNMENT) * ALIGNMENT
            for name in group:
                parts.append(Part(name, offset, shapes[name]))
                offset += shapes[name].numel()
        return cls(tuple(parts), offset)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parameters' values in a flat buffer, in the order of `parts`."""
        return [flat[part.offset : part.offset + part.shape.numel()].view(part.shape) for part in self.parts]


def is_large(name: str) -> bool:
    """Whether a block's parameter of this name belongs to a large product and hence to the packed buffer."""
    return ".to_" in name or name.startswith("ffn.")


def large_parameters(block: Block, layout: BlockLayout) -> list[nn.Parameter]:
    """The parameters themselves, in the order of `layout.parts`."""
    named = dict(block.named_parameters())
    return [named[part.name] for part in layout.parts]


def packed_buffer(block: Block) -> Tensor | None:
    """The flat buffer `[size]` that a block's large parameters are views of; None if they are not packed."""
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
    """Pack every block where it is, one after the other, so that only one block's weights are held twice."""
    for block in _blocks(transformer):
        if packed_buffer(block) is None:
            weight = block.attn1.to_q.weight
            flat = torch.empty(BlockLayout.of(block).size, dtype=weight.dtype, device=weight.device)
            pack_block(block, flat)


@torch.no_grad()
def move_packed(transformer: WanTransformer, device: torch.device) -> None:
    """`transformer.to(device)`, but blocks stay packed (`.to` would give each parameter its own memory)."""
    for block in _blocks(transformer):
        flat = packed_buffer(block)
        weight = block.attn1.to_q.weight
        if flat is None or flat.device != device:
            size = BlockLayout.of(block).size
            pack_block(block, torch.empty(size, dtype=weight.dtype, device=device))
    transformer.to(device)  # what is left; tensors already there are kept


def allocate_packed(
    transformer: WanTransformer, device: torch.device, dtype: torch.dtype, allocate: Allocate | None = None
) -> None:
    """Give a transformer made on the meta device uninitialised memory, packed; a loader then fills it:
    `parameter.data.copy_(tensor)`, tensor by tensor.

    Large products are in `dtype`, the rest in float32 (`WanTransformer.parameter_dtype`). `allocate`
    says where each block's buffer lies (default: on `device`, as everything else).
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
            held = WanTransformer.parameter_dtype(name, dtype)
            _replace(transformer, name, torch.empty(parameter.shape, dtype=held, device=device))


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    """A meta parameter cannot be given data: put a new one in its place."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    setattr(owner, leaf, nn.Parameter(value, requires_grad=owner.get_parameter(leaf).requires_grad))


def _blocks(transformer: WanTransformer) -> list[Block]:
    return [cast(Block, block) for block in transformer.blocks]
