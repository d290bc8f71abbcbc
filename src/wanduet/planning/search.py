"""The settings that the planner tries on one placement, fastest first."""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from wanduet.family.spec import ModelSpec
from wanduet.models.vae.rows import Tiling
from wanduet.planning.cost import cut_seconds, decode_seconds, swap_seconds
from wanduet.planning.placement import Placement
from wanduet.request import ResolvedRequest

DECODE_MODES = (
    *(Tiling("frame", strips) for strips in (1, 2, 4)),
    *(Tiling("strip", strips) for strips in (2, 3, 4, 6, 8, 12, 16)),
)
ENCODE_TILES = (1, 2, 4, 8, 16)


class Candidate(NamedTuple):
    """Settings to try; the fields are those of `plan.Plan` and its parts."""

    resident_blocks: int
    share_first: bool
    both_resident: bool
    tiling: Tiling
    encode_tiles: int = 1


def candidates(
    request: ResolvedRequest, spec: ModelSpec, place: Placement, weights: int, vae_dtype: str
) -> Iterator[Candidate]:
    """Yield all candidates, fastest first. `weights`: bytes of the transformer, which a decode moves off the device and
    back unless both models are resident."""
    layers = spec.transformer.num_layers
    on_cpu = place.transformer.is_cpu
    resident = (layers,) if on_cpu else tuple(sorted({layers, layers * 2 // 3, layers // 3, 0}, reverse=True))
    both = (True, False) if place.shared and not on_cpu else (True,)
    decode, swap = decode_seconds(request, spec, place.vae, vae_dtype), swap_seconds(weights)

    def seconds(way: tuple[bool, Tiling]) -> float:
        both_resident, tiling = way
        return cut_seconds(request, decode, tiling) + (0.0 if both_resident else swap)

    ways = sorted(product(both, DECODE_MODES), key=seconds)
    return (Candidate(blocks, share, *way) for blocks, share, way in product(resident, (True, False), ways))


def memory_rank(candidate: Candidate) -> tuple[bool | int, ...]:
    """Return a sort key that is smaller for settings that need less memory."""
    tiling = candidate.tiling
    return (
        candidate.resident_blocks,
        candidate.share_first,
        candidate.both_resident,
        tiling.order == "frame",
        -tiling.num_tiles,
    )
