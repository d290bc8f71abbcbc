"""Splits a sequence into consecutive parts, one for each rank."""

from collections.abc import Sequence
from itertools import accumulate, pairwise


def split_lengths(length: int, shares: Sequence[float], block: int = 1) -> tuple[int, ...]:
    """Return the lengths of consecutive parts of `length` tokens, in proportion to `shares`.

    Each boundary is rounded to the nearest multiple of `block` tokens.
    """
    total, blocks = sum(shares), -(-length // block)
    cuts = [min(length, block * round(blocks * share / total)) for share in accumulate(shares, initial=0.0)]
    return tuple(stop - start for start, stop in pairwise(cuts))


def rank_slice(lengths: Sequence[int], rank: int) -> slice:
    """Return the slice of the whole sequence that `rank` holds."""
    start = sum(lengths[:rank])
    return slice(start, start + lengths[rank])


def other_ranks(ranks: int, rank: int) -> list[int]:
    """Return all ranks but `rank`, starting with the next one, so that not all ranks write to the same one at once."""
    return [(rank + step) % ranks for step in range(1, ranks)]
