"""A sequence in consecutive parts, one a rank."""

from collections.abc import Sequence
from itertools import accumulate, pairwise


def split_lengths(length: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Cut `length` tokens into consecutive parts in proportion to `shares`, each rounded by less than one."""
    total = sum(shares)
    cuts = [round(length * share / total) for share in accumulate(shares, initial=0.0)]
    return tuple(stop - start for start, stop in pairwise(cuts))


def part_of(lengths: Sequence[int], rank: int) -> slice:
    """A rank's tokens in the whole sequence."""
    start = sum(lengths[:rank])
    return slice(start, start + lengths[rank])


def others(ranks: int, rank: int) -> list[int]:
    """The other ranks, from the next one on: not all write to the same one at a time."""
    return [(rank + step) % ranks for step in range(1, ranks)]
