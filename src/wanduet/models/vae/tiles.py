"""Layers on a row tile of a frame, and the halo rows that a tile passes to the tile below.

A tile without a neighbour starts with a halo of rows around it, which shrinks from layer to layer. A tile below another
one gets from it the rows of each layer's input that both read, and computes the remaining rows only: any number of
tiles together compute each row of each layer once (within a residual block, of two convolutions, up to two rows twice).
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import cast

from torch import Tensor, nn

from wanduet.kernels.vae.plain import Room
from wanduet.models.vae.arena import Arena
from wanduet.models.vae.layers import FeatureCache, Layer, NormedConv, Upsample
from wanduet.models.vae.rows import Rows

# The mid layers take this much longer than their number of weights suggests, because of attention and few pixels a
# frame. Measured on two H100 at 480p, from the work of each (benchmarks/results/two_gpus.json).
MID_FACTOR = 1.4


@dataclass(slots=True)
class Halo:
    """Rows that a tile, which computes the output rows `wanted`, passes to the tile below.

    `rows`: the last rows of each layer's input, by the layer's index; the next frames may overwrite them. `arena`:
    where they are allocated. `largest`: the number of rows that the upper tile's tensors have memory for, by the
    frame's height. The lower tile's tensors are allocated no smaller, so that they fit into the memory that those have
    left.
    """

    wanted: Rows
    arena: Arena | None = None
    rows: dict[int, Tensor] = field(default_factory=dict)
    largest: dict[int, int] = field(default_factory=dict)

    def store(self, index: int, x: Tensor) -> None:
        """Copy the last rows `[B, C, T, rows, w]` of layer `index`'s input, for the tile below."""
        stored = self.rows.get(index)
        if stored is not None and stored.shape == x.shape:
            stored.copy_(x)
        elif stored is None or self.arena is None:  # a video's first step has fewer frames: not worth arena memory
            self.rows[index] = x.clone()
        else:
            self.rows[index] = self.arena.clone(x)

    def load(self, index: int, below: Tensor | None, count: int) -> Tensor:
        """The `count` rows stored for layer `index`.

        `below`: the rows that the lower tile has computed of the same frames; None if there are none.
        """
        return self.rows[index]


def run_rows(
    layers: Sequence[Layer],
    x: Tensor,
    feature_cache: FeatureCache,
    wanted: Rows,
    above: Halo | None = None,
    below: Halo | None = None,
) -> tuple[Tensor, FeatureCache]:
    """Run layers on whole frames `x` `[B, C, T, h, w]`; returns the result's rows `wanted` and the next cache.

    `above`: the halo of the tile above, whose `wanted` rows end where these begin. `below`: stores the rows that the
    tile below needs.
    """
    rows = Rows.whole(x.shape[-2])
    levels = _levels(layers, wanted)
    starts = [level.start for level in levels]
    if above is not None:
        starts = [level.stop for level in _levels(layers, above.wanted)]
    new = [Rows(start, level.stop, level.height) for start, level in zip(starts, levels, strict=True)]
    needed = [layer.rows_needed(rows) for layer, rows in zip(layers, new[1:], strict=True)]
    largest = {} if above is None else dict(above.largest)
    for level in needed:
        largest[level.height] = max(level.count, largest.get(level.height, 0))
    if below is not None:
        below.largest = largest
    caches: list[FeatureCache] = []
    fresh: Tensor | None = x
    for index, (layer, cache) in enumerate(zip(layers, feature_cache or [None] * len(layers), strict=True)):
        out = new[index + 1]
        if out.count == 0:  # the tile above has computed all of it
            if below is not None and above is not None and index > 0 and out.stop < out.height:
                below.store(index, above.load(index, None, 0))
            caches.append(None)
            fresh = None
            continue
        if above is None or index == 0:
            assert fresh is not None
            x = rows.crop(fresh, needed[index])
        else:
            x = _join(above.load(index, fresh, new[index].start - needed[index].start), fresh, rows, needed[index])
        if below is not None and index > 0 and out.stop < out.height:
            first = layer.rows_needed(Rows(out.stop, out.stop + 1, out.height)).start
            below.store(index, needed[index].crop(x, Rows(first, needed[index].stop, needed[index].height)))
        halo_rows = 0
        if above is not None and index + 1 < len(layers) and new[index + 2].count:
            halo_rows = out.start - needed[index + 1].start
        room = Room(halo_rows, largest.get(out.height, 0))
        fresh, cache, rows = layer.step(x, cache, needed[index], room=room)
        caches.append(cache)
    assert fresh is not None
    return rows.crop(fresh, wanted), tuple(caches)


def share_decode(
    mid_layers: Sequence[nn.Module], layers: Sequence[Layer], height: int, shares: Sequence[float]
) -> tuple[tuple[Rows, ...] | None, bool]:
    """The tiles of `share_work`, and whether the first tile's device runs the mid layers for all devices.

    If it is too slow for that, each device runs them itself.
    """
    tiles = share_work(layers, height, shares, mid_layers)
    return (tiles, True) if tiles is not None else (share_work(layers, height, shares), False)


def share_work(
    layers: Sequence[Layer], height: int, shares: Sequence[float], mid_layers: Sequence[nn.Module] = ()
) -> tuple[Rows, ...] | None:
    """Divide a frame of `height` rows into one tile a share, whose work is in proportion to it, if tiles pass on halos.

    `mid_layers`: layers that the first tile's device runs in addition, on whole frames, before `layers`. Returns None
    if some tile would have no rows to compute at some layer.
    """
    costs, frames = [], 1
    first, *levels = _levels(layers, Rows.whole(height))
    for layer, level in zip(layers, levels, strict=True):
        frames *= 2 if isinstance(layer, Upsample) and layer.time_conv is not None else 1
        module = layer.conv if isinstance(layer, NormedConv) else cast(nn.Module, layer)
        costs.append(_weights(module) * frames * level.height / height)  # per row; columns double as rows do
    before = MID_FACTOR * sum(map(_weights, mid_layers)) * first.height**2 / height

    def work(stop: int) -> float:
        """The work for the rows above row `stop`, and for the rows that they need."""
        stops = [level.stop for level in _levels(layers, Rows(0, stop, height))[1:]]
        return sum(cost * rows for cost, rows in zip(costs, stops, strict=True))

    total, wanted = before + work(height), accumulate(shares[:-1])
    within = (bisect_left(range(height), share / sum(shares) * total - before, key=work) for share in wanted)
    cuts = [0, *within, height]
    tiles = tuple(Rows(a, b, height) for a, b in pairwise(cuts))
    stops = [[level.stop for level in _levels(layers, tile)] for tile in tiles if tile.count]
    all_work = all(a < b for above, below in pairwise(stops) for a, b in zip(above[1:], below[1:], strict=True))
    return tiles if all_work and len(stops) == len(tiles) else None


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _join(above: Tensor, fresh: Tensor | None, rows: Rows, needed: Rows) -> Tensor:
    """The needed rows: the halo `above`, then `fresh`, which has uninitialised rows at its top for the halo."""
    if fresh is None:
        return above
    x = rows.crop(fresh, needed)
    x[..., : above.shape[3], :].copy_(above)
    return x


def _levels(layers: Sequence[Layer], wanted: Rows) -> list[Rows]:
    """The rows of each layer's input that the result's rows `wanted` depend on; `wanted` itself comes last."""
    levels = [wanted]
    for layer in reversed(layers):
        levels.insert(0, layer.rows_needed(levels[0]))
    return levels
