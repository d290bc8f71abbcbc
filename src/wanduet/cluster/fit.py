"""Which job fits which replica, and how long it will take there: the plan, asked once for each demand and shape."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from wanduet.cluster.shapes import Shape
from wanduet.config import EngineConfig
from wanduet.engine.hardware import Hardware
from wanduet.engine.memory import ModelMemory
from wanduet.engine.plan import Plan, make_plan
from wanduet.errors import ConfigError, InvalidRequestError
from wanduet.request import GenerationRequest, ResolvedRequest
from wanduet.specs import ModelSpec

# A replica that streams its blocks from host memory is slower by up to so much, which the plan's seconds leave out.
STREAMING_COST = 1.15


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a job fits, its predicted seconds, and the predicted peak bytes of the fullest device."""

    fits: bool
    seconds: float = 1.0
    peak_bytes: int = 0


FitOf = Callable[[str], Fit]
ANYWHERE = Fit(True)


class Fitter:
    """Fits of one model under one configuration. Safe to use from any thread."""

    def __init__(self, memory: ModelMemory, config: EngineConfig) -> None:
        self._memory = memory
        self._config = config
        self.on_hardware = lru_cache(maxsize=4096)(self._on_hardware)

    def on(self, shape: Shape) -> FitOf:
        """Fits on replicas of a shape."""
        hardware = shape.hardware
        return lambda demand: self.on_hardware(demand, hardware)

    def plan(self, demand: str, hardware: Hardware) -> Plan:
        """The plan of a demand. Raises InvalidRequestError or ConfigError."""
        config = self._config if hardware.gpus else replace(self._config, devices="cpu")
        if hardware.gpus:
            config = replace(config, devices=None, speeds=None)
        # The nearest settings that fit are not asked for: looking for them takes seconds.
        return make_plan(parse_demand(demand, self._memory.spec), self._memory, config, hardware, nearest=False)

    def _on_hardware(self, demand: str, hardware: Hardware) -> Fit:
        try:
            plan = self.plan(demand, hardware)
        except InvalidRequestError:
            return ANYWHERE  # whoever takes it will say what is wrong with it
        except ConfigError:
            return Fit(False)  # a strategy that was asked for needs more devices than these
        layers = self._memory.spec.transformer.num_layers
        streams = plan.resident_blocks < layers or not plan.keep_both
        seconds = plan.seconds.total * (STREAMING_COST if streams else 1.0)
        return Fit(plan.fits, seconds, max((device.peak for device in plan.devices), default=0))


def parse_demand(demand: str, spec: ModelSpec) -> ResolvedRequest:
    """A request that needs what `demand_of` described. Raises InvalidRequestError for sizes that the model refuses."""
    try:
        size, steps, branches, videos = demand.split("/")
        height, width, frames = size.split("x")
        numbers = [None if text == "-" else int(text) for text in (height, width, frames, steps, branches, videos)]
    except ValueError:
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
        seed=0,
    )
    return request.resolve(spec)
