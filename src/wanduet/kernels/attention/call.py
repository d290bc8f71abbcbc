"""What attention gets beside q, k and v: where in the video, the model and the denoise a call is.

Exact backends ignore it. Sparse attention chooses its keys by it, and a backend may act differently by block or step.
"""

from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a denoise: its index in the sampler's schedule, from 0, and its timestep, 0..1000."""

    index: int
    timestep: float


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of an attention function: self-attention, or a part of it, of one block.

    `grid`: frames, rows and columns of tokens of the whole video; token `(frame, row, column)` is at position
    `(frame * rows + row) * columns + column` of the sequence, if the model does not order the tokens otherwise. `block`: from 0. `step`: None outside a denoise.

    A rank of a group computes a part. Its queries, its keys and its heads are consecutive ones, as many as q and k
    have; `first_query`, `first_key` (positions in the sequence) and `first_head` are the first ones, by default those of
    the whole attention.
    """

    grid: tuple[int, int, int]
    block: int = 0
    step: Step | None = None
    first_query: int = 0
    first_key: int = 0
    first_head: int = 0

    def part(self, query: int = 0, key: int = 0, head: int = 0) -> Self:
        """Return the part of this call that starts `query` queries, `key` keys and `head` heads later."""
        return replace(
            self,
            first_query=self.first_query + query,
            first_key=self.first_key + key,
            first_head=self.first_head + head,
        )
