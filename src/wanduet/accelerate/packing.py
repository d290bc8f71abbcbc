"""Packs a block's large parameters into one flat buffer, of which they become views.

Then q, k and v are computed by one matrix product (their weights are adjacent), and one copy moves a block between host
and device. The buffer is of bytes, because parameters may have different dtypes. Names and `state_dict` stay the same. No
other state is kept: whether a block is packed is determined from its parameters' addresses.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from wanduet.models.dit.block import Block
from wanduet.models.dit.linear import Linear
from wanduet.models.dit.model import WanTransformer

# Offsets are multiples of this many bytes, as cudaMalloc aligns.
ALIGNMENT = 256
# Parameters without gaps between them, in this order.
ADJACENT = (
    tuple(f"attn1.to_{part}.weight" for part in "qkv"),
    tuple(f"attn1.to_{part}.weight_scale" for part in "qkv"),
    tuple(f"attn1.to_{part}.bias" for part in "qkv"),
)

Allocate = Callable[[int, int], Tensor]
"""Allocates a flat uint8 buffer from (block index, number of bytes)."""


@dataclass(frozen=True, slots=True)
class Part:
    """The place of one parameter in a block's buffer; `offset` in bytes."""

    name: str
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the parameter."""
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """The places of a block's large parameters in its buffer of `size` bytes."""

    parts: tuple[Part, ...]
    size: int

    @classmethod
    def of(cls, block: Block) -> "BlockLayout":
        """The layout of a block, which may be on any device, including meta."""
        large = {name: p for name, p in block.named_parameters() if is_large(name)}
        others = [(name,) for name in large if not any(name in group for group in ADJACENT)]
        parts: list[Part] = []
        offset = 0
        for group in (*ADJACENT, *others):
            offset = -(-offset // ALIGNMENT) * ALIGNMENT
            for name in group:
                if name in large:
                    parts.append(Part(name, offset, large[name].shape, large[name].dtype))
                    offset += parts[-1].num_bytes
        return cls(tuple(parts), offset)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parameters' values as views of a flat uint8 buffer `[size]`, in the order of `parts`."""
        bytes_of = (flat[part.offset : part.offset + part.num_bytes] for part in self.parts)
        return [view.view(part.dtype).view(part.shape) for view, part in zip(bytes_of, self.parts, strict=True)]


def is_large(name: str) -> bool:
    """Whether a block's parameter belongs to a large product, and therefore to the packed buffer."""
    return ".to_" in name or name.startswith(("ffn.", "to_"))


def large_parameters(block: Block, layout: BlockLayout) -> list[nn.Parameter]:
    """A block's large parameters, in the order of `layout.parts`."""
    named = dict(block.named_parameters())
    return [named[part.name] for part in layout.parts]


def packed_buffer(block: Block) -> Tensor | None:
    """The flat uint8 buffer `[size]` of which a block's large parameters are views; None if they are not packed."""
    layout = BlockLayout.of(block)
    parameters = large_parameters(block, layout)
    first = parameters[0].data
    storage = first.untyped_storage()
    if storage.nbytes() < layout.size:
        return None
    flat: Tensor = torch.empty(0, dtype=torch.uint8, device=first.device)
    flat.set_(storage, 0, (layout.size,), (1,))
    for parameter, view in zip(parameters, layout.views(flat), strict=True):
        if parameter.data_ptr() != view.data_ptr() or parameter.dtype != view.dtype:
            return None
    return flat


def pack_block(block: Block, flat: Tensor) -> None:
    """Copy a block's large parameters into `flat` `[size]` uint8 and make them views of it."""
    layout = BlockLayout.of(block)
    for parameter, view in zip(large_parameters(block, layout), layout.views(flat), strict=True):
        view.copy_(parameter.data)
        parameter.data = view


def allocate_packed(
    transformer: WanTransformer, device: torch.device, dtype: torch.dtype, allocate: Allocate | None = None
) -> None:
    """Give a transformer on the meta device uninitialised memory, with packed blocks.

    A loader then fills it, tensor by tensor, by `parameter.data.copy_(tensor)`. Large products get `dtype`, the rest
    float32 (`WanTransformer.parameter_dtype`); matrices with a format of their own retain it. `allocate` allocates each
    block's buffer, by default on `device`.
    """
    formatted = {
        f"{name}.{part}"
        for name, module in transformer.named_modules()
        if isinstance(module, Linear) and module.has_format
        for part in ("weight", "weight_scale")
    }
    for name, parameter in transformer.named_parameters():
        if parameter.is_meta and name not in formatted:
            parameter.data = parameter.data.to(WanTransformer.parameter_dtype(name, dtype))
    for index, block in enumerate(_blocks(transformer)):
        layout = BlockLayout.of(block)
        if allocate is None:
            flat = torch.empty(layout.size, dtype=torch.uint8, device=device)
        else:
            flat = allocate(index, layout.size)
        for part, view in zip(layout.parts, layout.views(flat), strict=True):
            _replace(block, part.name, view)
    for name, parameter in list(transformer.named_parameters()):
        if parameter.is_meta:
            _replace(transformer, name, torch.empty(parameter.shape, dtype=parameter.dtype, device=device))


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter, because a meta parameter's data cannot be set."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    setattr(owner, leaf, nn.Parameter(value, requires_grad=owner.get_parameter(leaf).requires_grad))


def _blocks(transformer: WanTransformer) -> list[Block]:
    return [cast(Block, block) for block in transformer.blocks]
