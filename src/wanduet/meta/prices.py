"""What approximations cost on this machine, as `wanduet price` has measured it: stored by model, card, size and steps.

A file of JSON in the folder of measurements: for each `Subject`, the measures of each set of approximations, prompt by
prompt, so that an interrupted measurement goes on. Only `wanduet price` writes it, one process at a time.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from wanduet.family.speeds import FIELDS
from wanduet.folders import replace_json
from wanduet.request import EXACT_VALUES, OFF_VALUES, GenerationRequest, ResolvedRequest

FILE = "prices.json"
_PACKAGES = ("wanduet", "torch")
# The worst of several prompts. PSNR in dB (100: equal), SSIM at most 1, JOD at most 10; the others are 0 if equal.
MEASURES: Mapping[str, Callable[[Sequence[Any]], Any]] = {
    "latents_error": max,
    "psnr": min,
    "ssim": min,
    "st_lpips": max,
    "jod": min,
}


@dataclass(frozen=True, slots=True)
class Subject:
    """What a price belongs to: a price of another subject says nothing about it.

    `model`: the hash of the weights, or the name of random ones. `card`: the devices' models. `request`: the settings of
    the exact job, except prompt, seed and what does not change the latents. `engine`: the engine's settings that do.
    """

    model: str
    card: str
    engine: tuple[tuple[str, Any], ...]
    request: tuple[tuple[str, Any], ...]
    versions: tuple[tuple[str, str], ...]

    @classmethod
    def of(
        cls, request: ResolvedRequest, about: Mapping[str, str | None], card: str, engine: Mapping[str, Any]
    ) -> Self:
        """Return the subject of a request, without its approximations. `about`: the model's name and hash."""
        kept = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "sampler")
        schedule = ("flow_shift",) if request.timesteps is None else ("timesteps",)
        others = [
            name for name in OFF_VALUES.keys() - EXACT_VALUES.keys() if getattr(request, name) != OFF_VALUES[name]
        ]
        values = {name: getattr(request, name) for name in (*kept, *schedule, *others)}
        versions = tuple((name, _version(name)) for name in _PACKAGES)
        return cls(
            about["hash"] or str(about["name"]), card, tuple(engine.items()), tuple(sorted(values.items())), versions
        )

    @property
    def key(self) -> str:
        """The key in the file."""
        return sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Prices:
    """The measures of one subject. `about`: the subject, and the model's name, for people.

    `rows`: by the key of a set of approximations (`settings_key`), and by the number of the prompt: the measures of one
    video, `seconds`, `forwards` and those of MEASURES, where a measure that could not be taken is missing.
    """

    about: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    # By the same two keys: the relative error of the guided velocity in each step, along the exact trajectory.
    velocity_errors: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)

    def of(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the price of a set of approximations, as `wanduet price --json` prints it; None if not measured.

        `settings`: resolved fields, as `ResolvedRequest.approximations` returns them.
        """
        return summarise(list(self.rows.get(settings_key(settings), {}).values()))

    @property
    def job(self) -> str:
        """The size, steps and guidance of the exact job, in words; "" if they are not stored."""
        request: Any = self.about.get("request")
        try:
            return "{width}x{height}, {num_frames} frames, {num_inference_steps} steps, guidance {guidance_scale:g}".format(
                **request
            )
        except (TypeError, KeyError, ValueError):
            return ""

    def costs(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return all sets of approximations, fewer steps and controls that were measured, each with its price."""
        priced = [(json.loads(key), self.of(json.loads(key))) for key in self.rows]
        return [(settings, price) for settings, price in priced if price is not None]


def exact(request: GenerationRequest) -> GenerationRequest:
    """Return a request without its approximations."""
    fields = GenerationRequest.model_fields
    return request.model_copy(update={name: fields[name].default for name in (*EXACT_VALUES, *FIELDS)})


def settings_key(settings: Mapping[str, Any]) -> str:
    """Return the key of a set of approximations."""
    return json.dumps(dict(settings), sort_keys=True)


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the median and the worst of each measure over the prompts; None without any. Empty rows, of what could
    not be measured, do not count; a measure that no prompt has is null."""
    rows = [row for row in rows if row.get("seconds") is not None]
    if not rows:
        return None
    found: dict[str, Any] = {"prompts": len(rows)}
    found |= {name: statistics.median(row[name] for row in rows) for name in ("forwards", "seconds")}
    for name, worst in MEASURES.items():
        values = [row[name] for row in rows if row.get(name) is not None]
        found[name] = {"median": statistics.median(values), "worst": worst(values)} if values else None
    return found


def find_prices(folder: Path, subject: Subject) -> Prices | None:
    """Return what was measured of a subject. `folder`: of measurements. None if nothing was, or the file is damaged."""
    return _read(folder).get(subject.key)


def all_prices(folder: Path) -> list[Prices]:
    """Return all that was measured on this machine with the installed versions."""
    versions = {name: _version(name) for name in _PACKAGES}
    return [prices for prices in _read(folder).values() if prices.about.get("versions") == versions]


def store_prices(folder: Path, subject: Subject, prices: Prices) -> None:
    """Store what was measured of a subject, in place of what was stored of it. Raises OSError."""
    content = {key: asdict(one) for key, one in (_read(folder) | {subject.key: prices}).items()}
    replace_json(folder / FILE, content)


def worst_of(folder: Path, model: str, settings: Mapping[str, Any], measure: str) -> tuple[float, str] | None:
    """Return the worst value of a measure, over all sizes and steps that were measured of a model here with the installed
    versions and without LoRA, and the settings of the job that has it, in words; None if there is none. For a choice among
    approximations before size and steps are known.

    `model`: the hash of the weights, or the name of random ones. `measure`: of MEASURES.
    """
    found = [(prices.of(settings), prices.job) for prices in all_prices(folder) if _is_of(prices.about, model)]
    values = [
        (price[measure]["worst"], job) for price, job in found if price is not None and price[measure] is not None
    ]
    return MEASURES[measure](values) if values else None


def share_of_time(folder: Path, model: str, settings: Mapping[str, Any]) -> float | None:
    """Return the seconds of a set of approximations as a share of the exact job's, the largest of all sizes and steps that
    were measured; see `worst_of`. None if there is none."""
    found = [(prices.of(settings), prices.of({})) for prices in all_prices(folder) if _is_of(prices.about, model)]
    shares = [one["seconds"] / exact["seconds"] for one, exact in found if one and exact and exact["seconds"]]
    return max(shares, default=None)


def _is_of(about: Mapping[str, Any], model: str) -> bool:
    engine = about.get("engine")
    return about.get("model") == model and not (isinstance(engine, dict) and engine.get("loras"))


def price_of(folder: Path, subject: Subject, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the price of a set of approximations of a subject; None if there are none, or they are not measured."""
    prices = find_prices(folder, subject) if settings else None
    return None if prices is None else prices.of(settings)


def in_words(price: Mapping[str, Any]) -> str:
    """Return a price in one line, for people: medians, and the worst of the prompts in brackets."""
    forms = {
        "latents_error": ("latents differ by {:.1%}", "{:.1%}"),
        "psnr": ("PSNR {:.1f} dB", "{:.1f}"),
        "ssim": ("SSIM {:.3f}", "{:.3f}"),
        "st_lpips": ("ST-LPIPS {:.4f}", "{:.4f}"),
        "jod": ("JOD {:.2f}", "{:.2f}"),
    }
    measures = [
        f"{form.format(found['median'])} (worst {short.format(found['worst'])})"
        for name, (form, short) in forms.items()
        if (found := price.get(name)) is not None
    ]
    prompts = f"over {price['prompts']} prompt{'s' * (price['prompts'] > 1)}"
    return f"{price['forwards']:g} forwards, {price['seconds']:.3g} s; {', '.join(measures)}; {prompts}"


def card_of(models: Iterable[str]) -> str:
    """Return the card of a subject, from the names of the devices that share the work."""
    names = sorted(models)
    return ", ".join(f"{names.count(name)}x {name}" if names.count(name) > 1 else name for name in dict.fromkeys(names))


def _read(folder: Path) -> dict[str, Prices]:
    """Return the file's prices by key; those of a wrong form are left out."""
    try:
        content = json.loads((folder / FILE).read_text(), parse_constant=lambda _: None)  # NaN is no measure
    except (OSError, ValueError, RecursionError):
        return {}
    read = {key: _parsed(one) for key, one in content.items()} if isinstance(content, dict) else {}
    return {key: prices for key, prices in read.items() if prices is not None}


def _parsed(one: Any) -> Prices | None:
    try:
        return Prices(**one) if _is_whole(one) else None
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None


def _is_whole(one: Any) -> bool:
    if not all(isinstance(json.loads(key), dict) for key in one["rows"]):
        return False
    rows = [row for of_set in one["rows"].values() for row in of_set.values()]
    made = [row for row in rows if row.get("seconds") is not None]
    numbers = [row[name] for row in made for name in ("forwards", "seconds")]
    numbers += [row[name] for row in made for name in MEASURES if row.get(name) is not None]
    numbers += [
        error
        for of_set in one.get("velocity_errors", {}).values()
        for errors in of_set.values()
        for error in errors
        if error is not None
    ]
    return isinstance(one["about"], dict) and all(map(math.isfinite, numbers))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
