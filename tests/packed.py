"""Transformers with packed blocks, as a loader makes them."""

import torch

from wanduet.accelerate.packing import BlockLayout, pack_block
from wanduet.models.dit.model import WanTransformer


def pack_blocks(transformer: WanTransformer, device: str | torch.device = "cpu") -> None:
    """Move a transformer to a device, its blocks packed."""
    with torch.no_grad():
        for block in transformer.blocks:
            pack_block(block, torch.empty(BlockLayout.of(block).size, dtype=torch.uint8, device=device))
        transformer.to(device)  # the remaining parameters
