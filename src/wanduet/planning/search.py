"""What a plan may try on one placement, from the fastest settings to the slowest."""

from collections.abc import Iterator
from itertools import product

from wanduet.family.specs import ModelSpec
from wanduet.models.vae.rows import DecodePlan
from wanduet.planning.cost import cut_seconds, decode_seconds, turn_seconds
from wanduet.planning.placement import Placement
from wanduet.request import ResolvedRequest

DECODE_MODES = (
    *(DecodePlan("frame", strips) for strips in (1, 2, 4)),
    *(DecodePlan("strip", strips) for strips in (2, 3, 4, 6, 8, 12, 16)),
)

Candidate = tuple[int, bool, bool, DecodePlan]
"""Resident blocks, whether prompts share the first self-attention, whether both models stay loaded, decode mode."""


def candidates(request: ResolvedRequest, spec: ModelSpec, place: Placement, weights: int) -> Iterator[Candidate]:
    """All of them; `weights` are the transformer's bytes, which have to move where the models take turns."""
    layers = spec.transformer.num_layers
    on_cpu = place.transformer.is_cpu
    resident = (layers,) if on_cpu else tuple(sorted({layers, layers * 2 // 3, layers // 3, 0}, reverse=True))
    keep_both = (True, False) if place.shared and not on_cpu else (True,)
    decode, turn = decode_seconds(request, spec, place.vae), turn_seconds(weights)

    def seconds(way: tuple[bool, DecodePlan]) -> float:
        keep, mode = way
        return cut_seconds(request, decode, mode) + (0.0 if keep else turn)

    ways = sorted(product(keep_both, DECODE_MODES), key=seconds)
    return ((blocks, share, *way) for blocks, share, way in product(resident, (True, False), ways))


def bulk(candidate: Candidate) -> tuple[bool | int, ...]:
    """Smaller for settings that need less memory."""
    resident, share_first, keep_both, mode = candidate
    return resident, share_first, keep_both, mode.order == "frame", -mode.num_strips
