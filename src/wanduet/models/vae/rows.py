"""Rows of a frame: which ones a computation covers, how each layer changes that, and how a decode is tiled by rows.

A 3x3 convolution reads one row above and one below. A computation on some rows of a frame is exact if it starts with
enough rows around them (a halo) and drops one on each side at every convolution, except at the frame's true border,
where zeros are padded as for the whole frame. Nothing is blended.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows `start:stop` of a frame of `height` rows."""

    start: int
    stop: int
    height: int

    @classmethod
    def whole(cls, height: int) -> "Rows":
        """All rows of a frame."""
        return cls(0, height, height)

    @property
    def count(self) -> int:
        """The number of rows."""
        return self.stop - self.start

    @property
    def padding(self) -> tuple[int, int]:
        """Zero rows that a 3x3 convolution pads above and below: one at the frame's border, else none."""
        return int(self.start == 0), int(self.stop == self.height)

    def widened(self, rows: int) -> "Rows":
        """Add up to `rows` rows on each side: the input that `rows` 3x3 convolutions need to compute these rows."""
        return Rows(max(0, self.start - rows), min(self.height, self.stop + rows), self.height)

    def narrowed(self) -> "Rows":
        """The output rows of a 3x3 convolution whose input is these rows."""
        top, bottom = self.padding
        return Rows(self.start + 1 - top, self.stop - 1 + bottom, self.height)

    def common(self, other: "Rows") -> "Rows":
        """The intersection with other rows of the same frame; may be empty."""
        start = max(self.start, other.start)
        return Rows(start, max(start, min(self.stop, other.stop)), self.height)

    def extended_above(self, rows: int) -> "Rows":
        """Add exactly `rows` rows above, even beyond the frame's border."""
        return Rows(self.start - rows, self.stop, self.height)

    def doubled(self) -> "Rows":
        """The same part of a frame twice as high."""
        return Rows(2 * self.start, 2 * self.stop, 2 * self.height)

    def halved(self) -> "Rows":
        """The output rows of a 3x3 convolution of stride 2, padded below at the frame's border, on these rows."""
        bottom = self.height // 2 if self.stop == self.height else (self.stop - 1) // 2
        return Rows((self.start + 1) // 2, bottom, self.height // 2)

    def sources_of_double(self) -> "Rows":
        """The rows of a frame half as high that nearest-neighbour doubling needs to compute these rows."""
        return Rows(self.start // 2, -(-self.stop // 2), self.height // 2)

    def sources_of_half(self) -> "Rows":
        """The rows of a frame twice as high that the stride-2 convolution needs to compute these rows."""
        return Rows(2 * self.start, min(2 * self.height, 2 * self.stop + 1), 2 * self.height)

    def crop(self, x: Tensor, wanted: "Rows") -> Tensor:
        """A view of the rows `wanted` of `x` `[..., rows, columns]`, which covers these rows."""
        return x[..., wanted.start - self.start : wanted.stop - self.start, :]


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a decode is divided: into how many row tiles (`num_tiles`, at least 1), and which loop is the outer one.

    `order` "frame": for each frame, all tiles. Frames stream out; the feature caches of all tiles are kept.
    `order` "strip": for each tile, all frames. The feature cache of one tile is kept. (Plans print both values.)
    """

    order: Literal["frame", "strip"] = "frame"
    num_tiles: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError if `num_tiles` is below 1."""
        if self.num_tiles < 1:
            raise ValueError(f"num_tiles={self.num_tiles} must be at least 1.")

    def tiles(self, height: int) -> tuple[Rows, ...]:
        """The tiles of a frame of `height` rows, top to bottom, as equal as possible.

        Where tiles reuse the rows of the tile above, the first one computes slightly more rows than the others, whose
        tensors therefore fit into the memory that its tensors have left.
        """
        return tuple(split_rows(Rows.whole(height), [1.0] * self.num_tiles))


WHOLE_FRAMES = Tiling()


def split_rows(rows: Rows, weights: Sequence[float]) -> list[Rows]:
    """Split rows into consecutive parts in proportion to `weights`; empty parts are left out."""
    total = sum(weights)
    cuts = [rows.start + round(rows.count * share / total) for share in accumulate(weights, initial=0.0)]
    return [Rows(a, b, rows.height) for a, b in pairwise(cuts) if b > a]
