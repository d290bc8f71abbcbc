"""The named speeds: sets of request fields, from exact to the fastest, and what each loses. Does not import torch.

A loss is the PSNR of the frames against the exact video of the same seed, in dB: about 40 dB is hard to see, 30 dB is
plain to see in places, and two seeds differ by about 15 dB.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from wanduet.errors import InvalidRequestError
from wanduet.family.attention import FIELD as ATTENTION
from wanduet.family.attention import FORMATS
from wanduet.family.spec import ModelSpec
from wanduet.family.step_caches import OFF

SpeedName = Literal["exact", "near", "fine", "fast", "draft"]
EXACT: SpeedName = "exact"
FIELDS = ("speed", "loss_budget")  # of a request, which stand for other fields


@dataclass(frozen=True, slots=True)
class Speed:
    """A name and the request fields that it sets; an exact one sets none."""

    name: SpeedName
    fields: Mapping[str, Any]


# Chosen on the miniature: benchmarks/results/step_caches_miniature.json. EasyCache needs no constants of the model, so
# all models have all speeds. Below 26 forwards, ending guidance early loses less than fewer steps or more skipped ones.
SPEEDS: tuple[Speed, ...] = (
    Speed("exact", {}),
    Speed("near", {"step_cache": "easycache:0.02"}),
    Speed("fine", {"step_cache": "easycache:0.05"}),
    Speed("fast", {"step_cache": "easycache:0.1"}),
    Speed("draft", {"step_cache": "easycache:0.2", "guidance_gate": 0.3}),
)
BY_NAME: Mapping[str, Speed] = {speed.name: speed for speed in SPEEDS}
CHOSEN = frozenset(name for speed in SPEEDS for name in speed.fields)  # the fields that speeds set
assert tuple(BY_NAME) == get_args(SpeedName)
_OFF_VALUES: Mapping[str, Any] = {"step_cache": OFF, "guidance_gate": 1.0}
assert _OFF_VALUES.keys() == CHOSEN


@dataclass(frozen=True, slots=True)
class Price:
    """What a speed loses: the PSNR in dB, of the worst of several prompts or their mean, and whose figure it is. `time`: its
    seconds as a share of the exact job's, if they were measured."""

    psnr: float
    of: Literal["worst", "mean"]
    source: str  # "measured on this machine", for example
    time: float | None = field(default=None, compare=False)

    def __str__(self) -> str:
        """A part of a sentence."""
        return f"{self.of} PSNR {self.psnr:.1f} dB ({self.source})"


def price_dict(price: Price | None) -> dict[str, Any] | None:
    """Return a price as plans, results and metadata have it."""
    return None if price is None else {"psnr": {price.of: round(price.psnr, 2)}, "source": price.source}


# Returns what a set of request fields loses with the weights in use on this machine; None if it was not measured.
Prices = Callable[[Mapping[str, Any]], Price | None]


def not_measured(_: Mapping[str, Any]) -> None:
    """`Prices` of a model that was not measured."""
    return


_MINIATURE = "published with wanduet: four prompts, 50 steps"
# By the transformer's blocks and their width, and the name of the speed.
PUBLISHED: Mapping[tuple[int, int], Mapping[str, Price]] = {
    (30, 1536): {
        "fine": Price(25.24, "mean", "published for 50 steps of Wan2.1 1.3B, arXiv 2507.02860; not measured here")
    },
    (6, 256): {
        name: Price(psnr, "worst", _MINIATURE)
        for name, psnr in (("near", 45.3), ("fine", 37.0), ("fast", 30.7), ("draft", 21.4))
    },
}


def price_of_speed(speed: str | None, spec: ModelSpec, prices: Prices, attention: str = OFF) -> Price | None:
    """Return what a speed loses: as measured, else as published; None if neither is known, and for the exact one.

    `attention`: the field `quantize_attention` beside it, with which nothing is published.
    """
    if attention != OFF:
        return prices({**fields_set_by(speed), ATTENTION: attention})
    if speed in (None, EXACT):
        return None
    assert speed is not None
    shape = (spec.transformer.num_layers, spec.transformer.dim)
    published = {} if spec.defaults.timesteps else PUBLISHED.get(shape, {})  # few-step weights are other weights
    return prices(fields_set_by(speed)) or published.get(speed)


def within(budget: float, spec: ModelSpec, prices: Prices) -> list[dict[str, Any]]:
    """Return the sets of fields whose PSNR is known to be at least `budget` dB, fastest first: the speeds, the exact one last,
    and those with attention in 8 bits that were measured to take less time than the speed behind them."""
    found: list[tuple[float | None, dict[str, Any]]] = []
    for speed in reversed(SPEEDS[1:]):
        price = price_of_speed(speed.name, spec, prices)
        if price is not None and price.psnr >= budget:
            found.append((price.time, {"speed": speed.name}))
    found.append((1.0, {"speed": EXACT}))
    timed = []
    for name in (None, *(speed.name for speed in SPEEDS[1:])):
        for attention in FORMATS:
            price = price_of_speed(name, spec, prices, attention)
            if price is not None and price.time is not None and price.psnr >= budget:
                timed.append((price.time, {"speed": name, ATTENTION: attention}))
    for time, fields in sorted(timed, key=lambda one: one[0]):
        slower = [number for number, (other, _) in enumerate(found) if other is not None and other > time]
        if slower:
            found.insert(slower[0], (time, fields))
    return [fields for _, fields in found]


def fields_set_by(speed: str | None) -> Mapping[str, Any]:
    """Return the request fields that a speed sets; {} for None."""
    return {} if speed is None else BY_NAME[speed].fields


def with_speed(request: Mapping[str, Any], speed: object) -> dict[str, Any]:
    """Return the request in a video's metadata with the speed that they name beside it, if this version has it.

    Metadata omit fields that are off, so a field of the speed that they do not have was switched off by hand.
    """
    if not isinstance(speed, str) or speed not in BY_NAME:
        return dict(request)
    return {name: _OFF_VALUES[name] for name in fields_set_by(speed)} | dict(request) | {"speed": speed}


def refused(speed: str | None, error: InvalidRequestError, spec: ModelSpec) -> InvalidRequestError:
    """Return the error of a speed whose field is not allowed in a run, from the error of that field."""
    if steps := spec.defaults.timesteps:
        allowed = f"{EXACT} with few-step weights: their {len(steps)} steps are fast already, and leave nothing to skip"
    else:
        allowed = f"{EXACT}, because the speed sets {error.field}={error.given!r}, and that must be {error.allowed}"
    return InvalidRequestError("speed", speed, allowed, EXACT)


def forecast(plan: Mapping[str, Any]) -> str:
    """Return what a plan, as JSON, predicts of approximations, as one line; empty if the request asks for none."""
    forwards, price = plan.get("predicted_forwards"), plan.get("price")
    parts = [f"speed {plan['speed']}"] if "speed" in plan else []
    attention = [one["value"] for one in plan.get("choices", ()) if one["setting"] == ATTENTION]
    parts += [f"attention in {value}" for value in attention]
    if forwards is not None:
        parts.append(f"{'about ' * forwards['is_estimate']}{forwards['count']} of {forwards['of']} forwards a video")
    if price is not None:
        kind = "worst" if "worst" in price["psnr"] else "mean"
        source = price.get("source", "measured on this machine")
        parts.append(f"{kind} PSNR {price['psnr'][kind]:.1f} dB ({source})")
    elif plan.get("speed") not in (None, EXACT):
        parts.append("which skips nothing here" if forwards is None else "what it loses here is not known")
    return ", ".join(parts)
