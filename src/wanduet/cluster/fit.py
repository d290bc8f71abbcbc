"""Predicts which jobs fit which replicas, and how long they take: one plan for each demand and shape."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import log
from typing import Any

from wanduet.cluster.shapes import Shape
from wanduet.config import EngineConfig
from wanduet.errors import ConfigError, InvalidRequestError
from wanduet.family.spec import ModelSpec
from wanduet.footprint.phases import ModelMemory
from wanduet.jobs.records import LORAS, SHORT_NAMES, SHORT_WORDS
from wanduet.planning.hardware import Hardware
from wanduet.planning.plan import Plan
from wanduet.planning.planner import make_plan
from wanduet.request import INPUT_HASH, REQUEST_FIELDS, GenerationRequest, ResolvedRequest

# Streaming blocks from host memory slows a replica by up to this factor, which the plan's seconds omit.
STREAMING_COST = 1.15


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a job fits, its predicted seconds, and the predicted peak bytes of the fullest device."""

    fits: bool
    seconds: float = 1.0
    peak_bytes: int = 0


def preference(shape: Shape, fit: Fit) -> tuple[int, int, int]:
    """Return a sort key of replicas, best first: device-seconds of a job, then size and number of the GPUs.

    Device-seconds are rounded to about a tenth: a smaller gain is not worth GPUs that other jobs may need.
    """
    spent = round(log(max(1, shape.gpus) * max(fit.seconds, 1e-3), 1.1))
    return spent, sum(device.total_bytes for device in shape.devices), shape.gpus


FitOf = Callable[[str], Fit]
ANYWHERE = Fit(True)
NOWHERE = Fit(False)
NUMBERS = {name for name, field in REQUEST_FIELDS.items() if field.is_number}


class Fitter:
    """Predicts fits of one model under one configuration. Thread-safe."""

    def __init__(self, memory: ModelMemory, config: EngineConfig) -> None:
        self._memory = memory
        self._config = config
        self.on_hardware = lru_cache(maxsize=4096)(self._on_hardware)

    def on(self, shape: Shape) -> FitOf:
        """Return a function that predicts fits on replicas of a shape."""
        hardware = shape.hardware
        return lambda demand: self.on_hardware(demand, hardware)

    def plan(self, demand: str, hardware: Hardware) -> Plan:
        """Return the plan of a demand. Raises InvalidRequestError or ConfigError."""
        config = self._config if hardware.gpus else replace(self._config, devices="cpu")
        if hardware.gpus:
            config = replace(config, devices=None, device_speeds=None)
        # Do not search for the nearest settings that fit, which takes seconds.
        return make_plan(parse_demand(demand, self._memory.spec), self._memory, config, hardware, nearest=False)

    def _on_hardware(self, demand: str, hardware: Hardware) -> Fit:
        try:
            plan = self.plan(demand, hardware)
        except InvalidRequestError as error:
            if error.field in ("quantize", "quantize_attention"):
                return NOWHERE  # another card may have this format
            return ANYWHERE  # a replica takes it and reports the error
        except ConfigError:
            return NOWHERE  # the configured strategy needs more devices
        streams = plan.transformer.resident_blocks < self._memory.spec.transformer.num_layers or not plan.both_resident
        slower = STREAMING_COST if streams and plan.prediction.seconds.denoise else 1.0
        seconds = (plan.prediction.seconds.denoise + plan.prediction.seconds.decode) * slower
        return Fit(plan.prediction.fits, seconds, max((device.peak for device in plan.prediction.devices), default=0))


def parse_demand(demand: str, spec: ModelSpec) -> ResolvedRequest:
    """Return a request that needs what `demand_of` described.

    Raises InvalidRequestError for sizes that the model refuses.
    """
    try:
        size, steps, branches, videos, *rest = demand.split("/")
        given = [text for text in rest if "=" not in text]
        skips: dict[str, str] = dict(text.split("=") for text in rest if "=" in text)
        skips.pop(LORAS, None)  # they need host memory, which is not what limits a replica
        words = {short: word for word, short in SHORT_WORDS.items()}
        fields: dict[str, Any] = {}
        for short, value in skips.items():
            word, colon, number = value.partition(":")
            fields[SHORT_NAMES[short]] = f"{words.get(word, word)}{colon}{number}"
        fields |= {name: float(fields[name]) for name in fields.keys() & NUMBERS}
        strength = None if given in ([], ["-"]) else float(*given)
        height, width, frames = size.split("x")
        numbers = [None if text == "-" else int(text) for text in (height, width, frames, steps, branches, videos)]
    except (ValueError, TypeError, KeyError):
        raise InvalidRequestError("demand", demand, "it must be what `demand_of` makes") from None
    default = spec.defaults.guidance_scale
    scale = {None: None, 1: 1.0, 2: default if default > 1.0 else 5.0}[numbers[4]]
    request = GenerationRequest.parse(
        prompt="-",
        height=numbers[0],
        width=numbers[1],
        num_frames=numbers[2],
        num_inference_steps=numbers[3],
        guidance_scale=scale,
        num_videos_per_prompt=numbers[5] or 1,
        input_video=f"{INPUT_HASH}-" if given else None,
        strength=strength,
        seed=0,
        **fields,
    )
    return request.resolve(spec)
