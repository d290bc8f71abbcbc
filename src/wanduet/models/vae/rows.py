"""Which rows of a frame a computation covers, and how each layer changes that.

Convolutions look one row up and down. A computation on some rows of a frame is exact if it starts with
enough rows around them (a halo) and drops one on each side at every convolution, except at the frame's
true border, where zeros are padded as for the whole frame. Nothing is blended.
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
        """How many rows these are."""
        return self.stop - self.start

    @property
    def padding(self) -> tuple[int, int]:
        """Zero rows that a 3x3 convolution pads above and below: one at a true border, else none."""
        return int(self.start == 0), int(self.stop == self.height)

    def widened(self, rows: int) -> "Rows":
        """These and up to `rows` more on each side: what `rows` convolutions need to give these."""
        return Rows(max(0, self.start - rows), min(self.height, self.stop + rows), self.height)

    def narrowed(self) -> "Rows":
        """What a 3x3 convolution gives for these rows."""
        top, bottom = self.padding
        return Rows(self.start + 1 - top, self.stop - 1 + bottom, self.height)

    def common(self, other: "Rows") -> "Rows":
        """The rows that are among these and others of the same frame; perhaps none."""
        start = max(self.start, other.start)
        return Rows(start, max(start, min(self.stop, other.stop)), self.height)

    def with_room(self, rows: int) -> "Rows":
        """These and exactly so many above."""
        return Rows(self.start - rows, self.stop, self.height)

    def doubled(self) -> "Rows":
        """The same part of a frame twice as high."""
        return Rows(2 * self.start, 2 * self.stop, 2 * self.height)

    def halved(self) -> "Rows":
        """What a 3x3 convolution of stride 2, padded below at the true border, gives for these rows."""
        bottom = self.height // 2 if self.stop == self.height else (self.stop - 1) // 2
        return Rows((self.start + 1) // 2, bottom, self.height // 2)

    def sources_of_double(self) -> "Rows":
        """The rows of a frame half as high that nearest-neighbour doubling needs to give these."""
        return Rows(self.start // 2, -(-self.stop // 2), self.height // 2)

    def sources_of_half(self) -> "Rows":
        """The rows of a frame twice as high that the stride-2 convolution needs to give these."""
        return Rows(2 * self.start, min(2 * self.height, 2 * self.stop + 1), 2 * self.height)

    def crop(self, x: Tensor, wanted: "Rows") -> Tensor:
        """The part of `x` `[..., rows, columns]` (which covers these rows) that covers `wanted`."""
        return x[..., wanted.start - self.start : wanted.stop - self.start, :]


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a decode is cut: which loop is outside, and into how many strips of rows.

    `frame`: every strip of a frame, then the next frame. Frames stream out; the history of all strips is
    kept. `strip`: all frames of a strip, then the next strip. The history of one strip is kept.
    """

    order: Literal["frame", "strip"] = "frame"
    num_tiles: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError for a number of strips below 1."""
        if self.num_tiles < 1:
            raise ValueError(f"num_tiles={self.num_tiles} must be at least 1.")

    def strips(self, height: int) -> tuple[Rows, ...]:
        """A frame of so many rows, cut. With rows handed on the first strip computes a little more than the others,
        which so find room where its tensors were."""
        return tuple(split_rows(Rows.whole(height), [1.0] * self.num_tiles))


def split_rows(rows: Rows, weights: Sequence[float]) -> list[Rows]:
    """Cut rows into consecutive parts in proportion to `weights`; parts that would be empty are left out."""
    total = sum(weights)
    cuts = [rows.start + round(rows.count * share / total) for share in accumulate(weights, initial=0.0)]
    return [Rows(a, b, rows.height) for a, b in pairwise(cuts) if b > a]
