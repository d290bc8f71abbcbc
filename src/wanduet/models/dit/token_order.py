"""An order of a video's tokens in which those of a block, which are neighbours in the sequence, are neighbours in the video.

Two of the three axes are divided into cells, a few tokens wide each way. The order goes through the cells one after the
other, along all of the third axis in each, back and forth. So a block is a piece of such a strand, about as long as wide,
wherever it begins: nothing is padded, no block is cut short but the last one, and any size of video will do.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from wanduet.family.sparsity import TILE, TILE_TOKENS
from wanduet.kernels.attention.sparse import Blocks

CPU = torch.device("cpu")
# Cells are tried that have up to MOST times more or less area than a side of an ideal block, and are at most MOST times as
# long as wide.
MOST = 1.5


@dataclass(frozen=True, slots=True, eq=False)
class TokenOrder:
    """A permutation of a sequence.

    `tokens` `[L]`: the token at each position, as an index in the order by frame, row and column. `positions` `[L]`: the
    position of each token. Both int64, on one device.
    """

    tokens: Tensor
    positions: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TileOrder(TokenOrder):
    """VSA's order of a sequence: tile by tile, and in each by frame, row and column. First come the smaller tiles, which are at
    the ends of the axes.

    `blocks`: the tiles as blocks of the sequence. `tiles` `[L]` int64: the tile of the token at each position.
    """

    blocks: Blocks
    tiles: Tensor


@lru_cache(maxsize=4)
def tile_order(grid: tuple[int, int, int], device: torch.device = CPU) -> TileOrder:
    """Return the order for frames, rows and columns of tokens, in tiles of `TILE`. Source: FastVideo's VSA."""
    if device != CPU:
        order = tile_order(grid)
        blocks = replace(order.blocks, starts=order.blocks.starts.to(device))
        return TileOrder(order.tokens.to(device), order.positions.to(device), blocks, order.tiles.to(device))
    token = torch.arange(math.prod(grid)).view(grid)
    parts = [
        part.flatten()
        for frames in token.split(TILE[0], 0)
        for rows in frames.split(TILE[1], 1)
        for part in rows.split(TILE[2], 2)
    ]
    parts.sort(key=lambda part: len(part) == TILE_TOKENS)
    tokens, sizes = torch.cat(parts), torch.tensor([len(part) for part in parts])
    starts = torch.cat((sizes.new_zeros(1), sizes.cumsum(0))).int()
    blocks = Blocks(starts, int((sizes < TILE_TOKENS).sum()))
    return TileOrder(tokens, tokens.argsort(), blocks, torch.arange(len(parts)).repeat_interleave(sizes))


@lru_cache(maxsize=4)
def token_order(grid: tuple[int, int, int], block: int, device: torch.device = CPU) -> TokenOrder:
    """Return the order for frames, rows and columns of tokens with the most compact blocks of `block` tokens."""
    if device != CPU:
        order = token_order(grid, block)
        return TokenOrder(order.tokens.to(device), order.positions.to(device))
    side = _ideal_side(grid, block)
    best, least = torch.arange(math.prod(grid)), math.inf
    for axis in range(3):
        across = [size for index, size in enumerate(grid) if index != axis]
        limits = [range(1, min(size, math.ceil(2 * side)) + 1) for size in across]
        for cell in product(*limits):
            area = math.prod(min(size, side) for size in across)
            is_compact = max(cell) <= MOST * min(cell) or min(across) < side
            if 1 / MOST <= cell[0] * cell[1] / area <= MOST and is_compact:
                tokens = _strands(grid, axis, cell)
                if (spread := _spread(tokens, grid, block)) < least:
                    best, least = tokens, spread
    positions = torch.empty_like(best)
    positions[best] = torch.arange(len(best))
    return TokenOrder(best, positions)


def _ideal_side(grid: tuple[int, int, int], block: int) -> float:
    """Return the side of a cube of `block` tokens; where an axis is shorter, of a square or a line that is as thick."""
    volume, sides = float(block), 3
    for size in sorted(grid):
        if size < volume ** (1 / sides) and sides > 1:
            volume, sides = volume / size, sides - 1
    return float(volume ** (1 / sides))


def _strands(grid: tuple[int, int, int], axis: int, cell: tuple[int, ...]) -> Tensor:
    """Return the tokens in the order of strands along `axis`, whose cross-section is about `cell`; sides are divided
    evenly."""
    token = torch.arange(math.prod(grid)).view(grid).movedim(axis, 0)
    rows, columns = (_cuts(size, side) for size, side in zip(token.shape[1:], cell, strict=True))
    strands: list[Tensor] = []
    for row, (top, bottom) in enumerate(rows):
        for left, right in columns if row % 2 == 0 else reversed(columns):
            strand = token[:, top:bottom, left:right]
            strands.append((strand.flip(0) if len(strands) % 2 else strand).flatten())
    return torch.cat(strands)


def _cuts(size: int, side: int) -> list[tuple[int, int]]:
    count = max(1, round(size / side))
    return [(size * i // count, size * (i + 1) // count) for i in range(count)]


def _spread(tokens: Tensor, grid: tuple[int, int, int], block: int) -> float:
    """Return the mean squared distance of tokens from the middle of their block; the last block is left out."""
    whole = max(1, len(tokens) // block)
    place = torch.stack(torch.unravel_index(tokens[: whole * block], grid)).float().view(3, whole, -1)
    return float(place.var(dim=2, correction=0).sum(0).mean())
