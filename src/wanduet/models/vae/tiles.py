"""Layers on a strip of a frame's rows, and what a strip hands to the one below it.

Alone, a strip starts with a halo of rows around it, which shrinks from layer to layer. Below another strip it takes
the rows of each layer's input that both read from that one, and computes only what is new: then any number of strips
together compute each row of each layer once (within a residual block, two convolutions, up to two rows twice).
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

# The trunk takes so much longer than its weights say: attention, and a frame of few pixels. Measured on two H100 at 480p, by
# what each of them had to do (benchmarks/results/two_gpus.json).
MID_FACTOR = 1.4


@dataclass(slots=True)
class Halo:
    """Between a strip, whose result are the rows `wanted`, and the strip below it.

    `rows` are the last rows of each layer's input, by the layer's place; they may be overwritten by the next frames'.
    `largest`: so many rows the upper strip's tensors have memory for, by the frame's height. The lower strip's take no
    less, so that they fit where those were.
    """

    wanted: Rows
    history: Arena | None = None
    rows: dict[int, Tensor] = field(default_factory=dict)
    largest: dict[int, int] = field(default_factory=dict)

    def store(self, index: int, x: Tensor) -> None:
        """A copy of rows `[B, C, T, rows, w]`."""
        kept = self.rows.get(index)
        if kept is not None and kept.shape == x.shape:
            kept.copy_(x)
        elif kept is None or self.history is None:  # a video's first step has fewer frames: not worth a lasting place
            self.rows[index] = x.clone()
        else:
            self.rows[index] = self.history.copy_of(x)

    def load(self, index: int, below: Tensor | None, count: int) -> Tensor:
        """The `count` rows that were kept. `below`: the new rows of the same frames, where there are any."""
        return self.rows[index]


def run_rows(
    layers: Sequence[Layer],
    x: Tensor,
    past: FeatureCache,
    rows: Rows,
    wanted: Rows,
    above: Halo | None = None,
    below: Halo | None = None,
) -> tuple[Tensor, FeatureCache]:
    """The wanted rows of the layers' result, of `x` `[B, C, T, rows, w]`; the past is a tuple of theirs.

    `above`: what the strip above has kept; its wanted rows end where these begin. `below`: where to keep what the
    next strip needs.
    """
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
    pasts: list[FeatureCache] = []
    fresh: Tensor | None = x
    for index, (layer, layer_past) in enumerate(zip(layers, past or [None] * len(layers), strict=True)):
        out = new[index + 1]
        if out.count == 0:  # the strip above has computed all of it
            if below is not None and above is not None and index > 0 and out.stop < out.height:
                below.keep(index, above.take(index, None, 0))
            pasts.append(None)
            fresh = None
            continue
        if above is None or index == 0:
            assert fresh is not None
            x = rows.crop(fresh, needed[index])
        else:
            x = _joined(above.take(index, fresh, new[index].start - needed[index].start), fresh, rows, needed[index])
        if below is not None and index > 0 and out.stop < out.height:
            first = layer.rows_needed(Rows(out.stop, out.stop + 1, out.height)).start
            below.keep(index, needed[index].crop(x, Rows(first, needed[index].stop, needed[index].height)))
        handed = 0
        if above is not None and index + 1 < len(layers) and new[index + 2].count:
            handed = out.start - needed[index + 1].start
        room = Room(handed, largest.get(out.height, 0))
        fresh, layer_past, rows = layer.step(x, layer_past, needed[index], room=room)
        pasts.append(layer_past)
    assert fresh is not None
    return rows.crop(fresh, wanted), tuple(pasts)


def share_decode(
    trunk: Sequence[nn.Module], layers: Sequence[Layer], height: int, shares: Sequence[float]
) -> tuple[tuple[Rows, ...] | None, bool]:
    """`share_work`, and whether the first strip's device runs the trunk for all. Where it is too slow for that, each runs
    it for itself."""
    strips = share_work(layers, height, shares, trunk)
    return (strips, True) if strips is not None else (share_work(layers, height, shares), False)


def share_work(
    layers: Sequence[Layer], height: int, shares: Sequence[float], trunk: Sequence[nn.Module] = ()
) -> tuple[Rows, ...] | None:
    """A frame's `height` rows in strips whose work is in proportion to shares, if strips hand on what both read.

    `trunk`: layers that the first strip's device runs besides, on whole frames, before these. None where that cannot be:
    where some strip would have nothing new to compute at some layer.
    """
    costs, frames = [], 1
    first, *levels = _levels(layers, Rows.whole(height))
    for layer, level in zip(layers, levels, strict=True):
        frames *= 2 if isinstance(layer, Upsample) and layer.time_conv is not None else 1
        module = layer.conv if isinstance(layer, NormedConv) else cast(nn.Module, layer)
        costs.append(_weights(module) * frames * level.height / height)  # of a row, whose columns double as the rows do
    before = MID_FACTOR * sum(map(_weights, trunk)) * first.height**2 / height

    def work(stop: int) -> float:
        """Of the rows above this one, and of what they need."""
        stops = [level.stop for level in _levels(layers, Rows(0, stop, height))[1:]]
        return sum(cost * rows for cost, rows in zip(costs, stops, strict=True))

    total, wanted = before + work(height), accumulate(shares[:-1])
    within = (bisect_left(range(height), share / sum(shares) * total - before, key=work) for share in wanted)
    cuts = [0, *within, height]
    strips = tuple(Rows(a, b, height) for a, b in pairwise(cuts))
    stops = [[level.stop for level in _levels(layers, strip)] for strip in strips if strip.count]
    apart = all(a < b for above, below in pairwise(stops) for a, b in zip(above[1:], below[1:], strict=True))
    return strips if apart and len(stops) == len(strips) else None


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _joined(above: Tensor, fresh: Tensor | None, rows: Rows, needed: Rows) -> Tensor:
    """The needed rows: those of the strip above, then the new ones in `fresh`, which has room for them on top."""
    if fresh is None:
        return above
    x = rows.crop(fresh, needed)
    x[..., : above.shape[3], :].copy_(above)
    return x


def _levels(layers: Sequence[Layer], wanted: Rows) -> list[Rows]:
    """The rows of each layer's input that the wanted rows of the last one's result need; these come last."""
    levels = [wanted]
    for layer in reversed(layers):
        levels.insert(0, layer.rows_needed(levels[0]))
    return levels
