"""The result of a measurement, as `wanduet price --json` prints it, with what the numbers mean."""

import statistics
from typing import Any

from wanduet.media.provenance import versions
from wanduet.meta.prices import summarise
from wanduet.price.compare import missing
from wanduet.price.measure import Measurement
from wanduet.price.variants import Measured

MEANING = (
    "Each row is compared with the exact video of the same prompt and seed. A row near the control another_seed shows another "
    "video, not necessarily a worse one; a row near bf16_floor differs by no more than rounding does.",
)
FEW_STEPS = (
    "Few-step weights are another model than the one they were distilled from. What that lost is no distance between "
    "videos, and is not measured: rows say what is lost against the exact videos of these weights."
)
MINIATURE = (
    "The miniature is a small model of a small world: the order of its losses counts, not their size. That its videos still "
    "show what the prompt says prices nothing: videos of another seed do too."
)
RANDOM = "The weights are random: seconds and forwards are true, losses mean nothing."
CHANGES = "A guidance mode saves no work: its videos differ because they are meant to, and its rows say how much, not how well."
NO_FLOOR = "bf16_floor is not measured: this plan has no other exact kernels."


def report(measurement: Measurement) -> dict[str, Any]:
    """Return all rows: of each named speed, each accelerator alone, other guidance, fewer steps, and the controls."""
    found: dict[str, Any] = dict(measurement.prices.about) | measurement.made_of
    for kind in ("rungs", "accelerators", "changes", "fewer_steps"):
        named = "speed" if kind == "rungs" else "name"
        of_kind = _unique([one for one in measurement.measured if one.variant.kind == kind])
        found[kind] = [
            {named: one.variant.name, "settings": dict(one.settings)} | _row(measurement, one) for one in of_kind
        ]
    controls = [one for one in measurement.measured if one.variant.kind == "controls"]
    found["controls"] = {one.variant.name: _row(measurement, one) or None for one in controls}
    found |= {
        "refused": measurement.refused,
        "notes": _notes(measurement, found["controls"]),
        "all_versions": versions(),
    }
    return found


def _row(measurement: Measurement, one: Measured) -> dict[str, Any]:
    prices = measurement.prices
    row = summarise(list(prices.rows.get(one.key, {}).values()))
    if row is None:
        return {}
    by_step = list(zip(*prices.velocity_errors.get(one.key, {}).values(), strict=True))
    return row | {"velocity_errors": [statistics.median(errors) for errors in by_step] or None}


def _unique(some: list[Measured]) -> list[Measured]:
    """Return the variants by name, the first of each."""
    return list({one.variant.name: one for one in reversed(some)}.values())[::-1]


def _notes(measurement: Measurement, controls: dict[str, Any]) -> list[str]:
    request, notes = measurement.request, list(MEANING)
    if request.timesteps is not None or request.sampler == "renoise":
        notes.append(FEW_STEPS)
    if any(one.variant.kind == "changes" for one in measurement.measured):
        notes.append(CHANGES)
    if measurement.is_miniature:
        notes.append(MINIATURE)
    if measurement.has_random_weights:
        notes.append(RANDOM)
    if not controls.get("bf16_floor"):
        notes.append(NO_FLOOR)
    return notes + missing()
