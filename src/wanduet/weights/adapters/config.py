"""Alpha and rank rules of a LoRA file: from PEFT's adapter_config.json, or from the copy that diffusers puts in a header."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanduet.errors import WeightsError
from wanduet.untrusted import cut, parse_json
from wanduet.weights.adapters.modules import official_name

METADATA_KEY = "lora_adapter_metadata"  # of diffusers' `save_lora_weights`
_TYPES = ("LORA", "LOHA", "LOKR")
# These also subtract the initial update from the base, so that the file fits a changed base alone.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
# PEFT takes patterns as regular expressions; a stranger's may take for ever.
_LONGEST, _MOST_REPEATS = 200, 4


@dataclass(frozen=True)
class AdapterConfig:
    """What a file says of alphas and ranks beside its tensors.

    `alpha`, `rank`: for modules that no pattern matches; None if the file does not say. `alpha_pattern`, `rank_pattern`:
    values for modules whose name, or its end after a dot, matches. `rslora`: alpha is divided by √r. `dora`: the file
    must have magnitudes.
    """

    alpha: float | None = None
    rank: int | None = None
    alpha_pattern: Mapping[re.Pattern[str], float] = field(default_factory=dict)
    rank_pattern: Mapping[re.Pattern[str], float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False

    def scale(self, module: str, rank: int, stored: float | None) -> tuple[float, float]:
        """Return the factor of a module's product, and its alpha.

        `module`: the Diffusers name. `stored`: the file's alpha for this module, which the config does not replace. An
        alpha of 0, and none, is the rank.
        """
        if stored is not None:
            alpha = stored or rank
            return alpha / rank, alpha
        configured = _by_pattern(self.alpha_pattern, module, self.alpha)
        if configured is None:
            return 1.0, float(rank)
        configured = configured or rank
        return configured / (math.sqrt(rank) if self.rslora else rank), configured

    def configured_rank(self, module: str) -> int | None:
        """Return the rank of a module by the config, for LoKr of two whole matrices, whose shapes do not show it."""
        found = _by_pattern(self.rank_pattern, module, self.rank)
        return None if found is None else int(found)


def parse_config(path: Path, config: Mapping[str, Any]) -> AdapterConfig:
    """Return the rules of a PEFT config. `path`: the file, for messages. Raises WeightsError for an invalid or an
    unsupported config."""
    kind = config.get("peft_type", "LORA")
    if kind not in _TYPES:
        raise WeightsError(f"{path} is an adapter of the type {cut(kind)}; wanduet reads {', '.join(_TYPES)}.")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(_CHANGES_BASE):
        raise WeightsError(
            f"{path} was trained from {cut(start)}, which changes the base model too.",
            hint="Save it with `path_initial_model_for_weight_conversion` of PEFT, as an ordinary LoRA.",
        )
    rank = _number(path, "r", config.get("r"))
    return AdapterConfig(
        alpha=_number(path, "lora_alpha", config.get("lora_alpha", config.get("alpha"))),
        rank=None if rank is None else int(rank),
        alpha_pattern=_pattern(path, "alpha_pattern", config.get("alpha_pattern")),
        rank_pattern=_pattern(path, "rank_pattern", config.get("rank_pattern")),
        rslora=config.get("use_rslora") is True,
        dora=config.get("use_dora") is True,
    )


def parse_metadata(path: Path, metadata: Mapping[str, Any]) -> AdapterConfig:
    """Return the rules in a safetensors header's metadata; without any, those of a file that says nothing."""
    text = metadata.get(METADATA_KEY)
    if text is None:
        return AdapterConfig()
    try:
        found = parse_json(text)
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{path} has damaged {METADATA_KEY}: {cut(error)}.") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path} has damaged {METADATA_KEY}: no JSON object.")
    return parse_config(path, {key.removeprefix("transformer."): value for key, value in found.items()})


def _number(path: Path, name: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise WeightsError(f"{path} has {name} {cut(repr(value))}, which is no number.")
    return float(value)


def _pattern(path: Path, name: str, value: object) -> dict[re.Pattern[str], float]:
    if not isinstance(value or {}, dict):
        raise WeightsError(f"{path} has a {name} that is no JSON object.")
    found: dict[re.Pattern[str], float] = {}
    for key, number in (value or {}).items():  # type: ignore[attr-defined]
        if len(key) > _LONGEST or len(re.findall(r"[*+?{]", key)) > _MOST_REPEATS or re.search(r"\)[*+{]", key):
            raise WeightsError(f"{path} has a {name} that is too complicated: {cut(key)}.")
        try:
            pattern = re.compile(rf"(.*\.)?({key})")
        except re.error as error:
            raise WeightsError(f"{path} has a {name} that is no regular expression: {cut(key)}.") from error
        found[pattern] = _number(path, name, number) or 0.0
    return found


def _by_pattern(patterns: Mapping[re.Pattern[str], float], module: str, otherwise: float | None) -> float | None:
    """Return the value of the first pattern that matches the end of a module's name, as PEFT does."""
    for pattern, value in patterns.items():
        if any(pattern.fullmatch(name) for name in (module, official_name(module))):
            return value
    return otherwise
