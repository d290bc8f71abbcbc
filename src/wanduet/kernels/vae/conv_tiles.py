"""Tiles of the VAE's convolution kernel: which there are for a number of channels, and what each takes on a GPU."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from wanduet.kernels.device import WGMMA_SHARED_MEMORY
from wanduet.kernels.vae.plain import uses_tf32

RESERVED = 1024  # bytes of a multiprocessor's shared memory that the system reserves for each program

Key = tuple[torch.device, int, torch.dtype, bool]
CHOSEN: dict[Key, str] = {}
"""Names of the tiles that `vae.choose` has measured, by device, width, dtype and whether TF32 is used."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Tile of a program: pixels x (`first` + `second`) output channels, `depth` input channels at a time.

    Channels are split in two parts because a block's sides must be powers of two, and the VAE's widths (96, 192) are
    not: 96 = 64 + 32. `second` may be 0. `swap`: channels are the rows of the matrix product and pixels its columns,
    instead of the reverse. `rows`: the number of rows of the frame that the pixels span, so that common neighbours are
    read once; with 1, the pixels are a run that may continue in the next row. `square`: a run adds up its taps in the
    order of tiles with several rows (see `near`). `cost`: time of a program relative to other tiles.
    """

    pixels: int
    first: int
    second: int
    depth: int
    warps: int
    stages: int
    swap: bool = False
    rows: int = 1
    square: bool = False
    cost: float = 1.0

    @property
    def name(self) -> str:
        """The tile's sides; identifies it in stored choices."""
        return f"{self.pixels}x({self.first}+{self.second})"

    @property
    def channels(self) -> int:
        """Output channels of a program."""
        return self.first + self.second

    def near(self, kh: int, kw: int) -> int:
        """Return the number of taps that are added up before the next input channels: those of a frame or of a row."""
        return kh * kw if self.square or self.rows > 1 else kw

    def programs(self, height: int, width: int) -> int:
        """Return the number of programs for a frame's pixels."""
        if self.rows == 1:
            return _divide_up(height * width, self.pixels)
        return _divide_up(height, self.rows) * _divide_up(width, self.pixels // self.rows)

    def waves(self, size: tuple[int, int, int, int], processors: int, itemsize: int, limit: int) -> int:
        """Return the number of waves of programs on a GPU; the last one takes as long as the others, full or not.

        `size`: images, rows, columns, output channels. `processors`: multiprocessors, each with `limit` bytes of shared
        memory.
        """
        images, height, width, outputs = size
        programs = images * self.programs(height, width) * _divide_up(outputs, self.channels)
        return _divide_up(programs, processors * max(1, limit // self.shared_memory(itemsize, limit)))

    def shared_memory(self, itemsize: int, limit: int) -> int:
        """Return the bytes of pipelined inputs and weights, in values of `itemsize` bytes; a program may use `limit`.

        If matrix units read from registers, the stage being multiplied is not in shared memory: one stage less.
        """
        stages = self.stages if limit >= WGMMA_SHARED_MEMORY else self.stages - 1
        return stages * (self.pixels + self.channels) * self.depth * itemsize

    def is_twice_in(self, itemsize: int, limit: int) -> bool:
        """Return True if a multiprocessor has room for two programs at a time; a single one may use `limit` bytes."""
        return 2 * (self.shared_memory(itemsize, limit) + RESERVED) <= limit + RESERVED


# Keys: a divisor of the number of output channels, and the largest size of a value in bytes; the first match is used.
# Measured on an H100: benchmarks/convolutions.py.
TILES = {
    (384, 2): (Tile(128, 128, 64, 64, 8, 3),),
    # The deepest of the larger layers. Half a 480p frame takes three waves on an H100 with runs of pixels, and a fourth
    # with squares, because their last row of tiles is half empty.
    (384, 4): (Tile(128, 128, 64, 32, 8, 3, rows=8), Tile(128, 128, 64, 32, 8, 3, square=True, cost=1.08)),
    (192, 2): (Tile(128, 128, 64, 64, 8, 3, swap=True, rows=8),),
    (192, 4): (Tile(128, 128, 64, 32, 8, 3, rows=8),),
    (96, 2): (Tile(128, 64, 32, 32, 4, 3, rows=4),),
    (96, 4): (Tile(128, 64, 32, 32, 4, 3, rows=4),),
}
SMALL_CHANNELS = ((64, 32), (128, 0))  # of tiles for GPUs without wgmma


@lru_cache
def tiles_for(inputs: int, outputs: int, itemsize: int, limit: int) -> tuple[Tile, ...]:
    """Return the tiles for a convolution in values of `itemsize` bytes, within `limit` bytes of shared memory.

    `inputs`, `outputs`: numbers of channels. All tiles have the same number of channels and the same order of
    summation: the result is the same to the last bit.
    """
    depth = max(16, min(_power_of_2(inputs), 128 // itemsize))  # 128 bytes of a pixel at a time
    tiles: tuple[Tile, ...] = (Tile(128, max(16, min(128, _power_of_2(outputs))), 0, depth, 4, 3),)
    for width, size in TILES:
        if outputs % width == 0 and itemsize <= size:
            tiles = TILES[width, size]
            break
    return tuple(_within(replace(tile, depth=min(tile.depth, depth)), itemsize, limit) for tile in tiles)


@lru_cache
def offered_tiles(inputs: int, outputs: int, itemsize: int, limit: int) -> tuple[Tile, ...]:
    """Return `tiles_for` and, on a GPU without wgmma, smaller tiles: a multiprocessor has room for two at a time.

    `TILES` were measured on a GPU with wgmma; `vae.choose` measures which to use on another. A smaller tile adds up the
    same taps and channels in the same order, because it has the depth, the `near` and the `swap` of the first. With a
    norm, a tile must have all channels of a pixel, and the compiler determines the order of their squares: the
    measurement compares results.
    """
    tiles = tiles_for(inputs, outputs, itemsize, limit)
    if limit >= WGMMA_SHARED_MEMORY or width_of(outputs, itemsize) is None:
        return tiles
    small = (replace(tiles[0], pixels=64, first=a, second=b, warps=4, stages=3, cost=1.0) for a, b in SMALL_CHANNELS)
    return (*tiles, *(tile for tile in small if outputs % tile.channels == 0 and tile.is_twice_in(itemsize, limit)))


def width_of(outputs: int, itemsize: int) -> int | None:
    """Return the width of `TILES` for a number of output channels; None if there is none."""
    return next((width for width, size in TILES if outputs % width == 0 and itemsize <= size), None)


def _within(tile: Tile, itemsize: int, limit: int) -> Tile:
    while tile.shared_memory(itemsize, limit) > limit:
        fewer = tile.stages > 2
        tile = replace(tile, stages=tile.stages - 1) if fewer else replace(tile, pixels=tile.pixels // 2)
    return tile


def _divide_up(count: int, size: int) -> int:
    return -(-count // size)


def _power_of_2(count: int) -> int:
    """Return the next power of 2, `count` itself if it is one."""
    return 1 << (count - 1).bit_length()


def chosen_tile(device: torch.device, width: int | None, dtype: torch.dtype) -> str | None:
    """Return the name of the tile chosen for a width of `TILES`; None if none was chosen and the first applies."""
    return None if width is None else CHOSEN.get((device, width, dtype, uses_tf32(dtype)))
