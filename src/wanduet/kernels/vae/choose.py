"""Chooses the tile of the VAE's convolutions on a GPU without wgmma: measures once on a machine and stores the result.

`conv_tiles.offered_tiles` lists the candidates. Each must give the first one's result to the last bit, which is checked here;
so a decode's frames do not depend on the choice, and each rank may choose independently. All need the same device
memory, so plans do not depend on the choice either.
"""

import logging
import statistics
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from wanduet.kernels.device import multiprocessors, shared_memory
from wanduet.kernels.measurements import Table, Timing, free_bytes, is_valid, read_table, stamped, write_table
from wanduet.kernels.precision import vae_precision
from wanduet.kernels.timing import milliseconds
from wanduet.kernels.vae.conv_tiles import CHOSEN, Key, Tile, offered_tiles, width_of
from wanduet.kernels.vae.plain import Epilogue, Filter, uses_tf32

log = logging.getLogger(__name__)

CHOICES_FILE = "convolutions.json"
# The timed frame: columns of a 480p video at each width (number of channels), and as many rows as fill the GPU `WAVES`
# times with the first tile. A launch takes a few milliseconds.
COLUMNS = {384: 208, 192: 416, 96: 832}
WAVES = 3
TIMED_ROUNDS = 5


def choose_tiles(
    device: torch.device,
    dtype: torch.dtype,
    outputs: Iterable[int],
    folder: Path,
    tf32: bool | None = None,
    may_measure: bool = True,
) -> None:
    """Choose the fastest tile on a GPU for convolutions with these numbers of output channels (`outputs`).

    Measurements are stored in `folder`. `may_measure`: False uses stored measurements only, because measuring is wrong
    on a GPU that computes something else. `tf32`: see `WanVAE.tf32`. Needs Triton; does nothing on a CPU, in Triton's
    interpreter, and on a GPU with only one candidate.
    """
    if device.type != "cuda":
        return
    import triton

    if triton.knobs.runtime.interpret:
        return
    widths = {width for count in outputs if (width := width_of(count, dtype.itemsize)) is not None}
    with vae_precision(tf32):
        for width in sorted(widths):
            key = (device, width, dtype, uses_tf32(dtype))
            offered = offered_tiles(width, width, dtype.itemsize, shared_memory(device))
            tiles = tuple({tile.name: tile for tile in reversed(offered)}.values())[::-1]
            if len(tiles) > 1 and key not in CHOSEN:
                table = _table(tiles, key, folder, may_measure)
                if table is not None:
                    CHOSEN[key] = min(table, key=_milliseconds).name


def _table(tiles: Sequence[Tile], key: Key, folder: Path, may_measure: bool) -> Table | None:
    """Return the stored table, or measure; None if there is none and `may_measure` is False."""
    device, width, dtype, tf32 = key
    names = ",".join(tile.name for tile in tiles)
    kept_as = f"{torch.cuda.get_device_name(device)}|{width}|{dtype}{' as TF32' * tf32}|{names}"
    table = read_table(folder, kept_as, CHOICES_FILE)
    if table is not None and is_valid(table, device):
        return table
    if not may_measure:
        return None
    table = stamped(measure(tiles, width, dtype, device), device)
    log.info("tiles for %s: %s", kept_as, {row.name: row.problem or row.milliseconds for row in table})
    write_table(folder, kept_as, table, CHOICES_FILE)
    return table


@torch.no_grad()
def measure(tiles: Sequence[Tile], width: int, dtype: torch.dtype, device: torch.device) -> Table:
    """Check each tile on a convolution of `width` channels; time alternately those with the first one's result."""
    dropped: list[Timing] = []
    times: dict[str, list[float]] = {}
    sample: _Sample | None = None
    expected: list[Tensor] = []
    for tile in tiles:
        try:
            sample = sample or _Sample(tiles[0], width, dtype, device)
            results = sample.results(tile)
            expected = expected or results
            if all(torch.equal(*pair) for pair in zip(results, expected, strict=False)):
                times[tile.name] = []
            else:
                dropped.append(Timing(tile.name, None, None, "its results are not those of the first"))
        except Exception as problem:  # a compiler can raise any exception
            log.info("Tile %s failed.", tile.name, exc_info=problem)
            short = isinstance(problem, torch.OutOfMemoryError)
            free = free_bytes(device) if short else None
            dropped.append(Timing(tile.name, None, None, type(problem).__name__, free_bytes=free))
    for tile in TIMED_ROUNDS * [tile for tile in tiles if tile.name in times]:
        assert sample is not None
        times[tile.name] += milliseconds(partial(sample.with_residual, tile), device)
    return (*(Timing(name, statistics.median(seen), None) for name, seen in times.items()), *dropped)


class _Sample:
    """A convolution as in a decode, on random values."""

    def __init__(self, first: Tile, width: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            x = torch.randn(shape, device=device, dtype=dtype, generator=generator)
            return x.to(memory_format=torch.channels_last_3d) if x.ndim == 5 else x

        columns = COLUMNS[width]
        rows = max(1, WAVES * multiprocessors(device) * first.channels // width * first.pixels // columns)
        self._width = width
        self._x, self._bias, self._gamma = draw(1, width, 1, rows, columns), draw(width), draw(width, 1, 1, 1)
        self._weight = draw(width, width, 3, 3, 3).div_((27 * width) ** 0.5)

    def results(self, tile: Tile) -> list[Tensor]:
        """Return the results of all forms of a tile: also with a norm, if the tile has all channels of a pixel."""
        plain = self.with_residual(tile)
        return [plain, self._convolved(tile, None, self._gamma)] if tile.channels >= self._width else [plain]

    def with_residual(self, tile: Tile) -> Tensor:
        """Return the result with a residual, the form that all tiles have."""
        return self._convolved(tile, self._x, None)

    def _convolved(self, tile: Tile, residual: Tensor | None, gamma: Tensor | None) -> Tensor:
        from wanduet.kernels.vae.conv import convolve

        out = torch.empty_like(self._x)
        filter = Filter(self._weight, self._bias, (1, 1))
        convolve(self._x, None, filter, Epilogue(out, residual, gamma), tile)
        return out


def _milliseconds(row: Timing) -> float:
    return float("inf") if row.milliseconds is None else row.milliseconds
