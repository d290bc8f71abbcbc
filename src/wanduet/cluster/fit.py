"""Predicts which jobs fit which replicas, and how long they take: one plan for each demand and shape.

A demand that begins with `decode:` is a job whose latents are saved: decoders take only such jobs, other replicas take
them, too.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf, log
from typing import Any, Literal

from wanduet.cluster.shapes import Node, Shape, Stage
from wanduet.cluster.stages import Costs, NodeCosts
from wanduet.config import EngineConfig
from wanduet.errors import ConfigError, InvalidRequestError
from wanduet.family.registry import RANDOM_SPECS
from wanduet.family.spec import ModelSpec
from wanduet.footprint.phases import ModelMemory, text_encoder_bytes
from wanduet.jobs.records import DECODE, LORAS, SHORT_NAMES, SHORT_WORDS
from wanduet.planning.cost import MOST_CORES, encode_seconds
from wanduet.planning.hardware import Hardware
from wanduet.planning.plan import Plan
from wanduet.planning.planner import HOST_BASE_BYTES, make_decode_plan, make_plan
from wanduet.planning.text import plan_text
from wanduet.request import INPUT_HASH, REQUEST_FIELDS, GenerationRequest, ResolvedRequest

# Streaming blocks from host memory slows a replica by up to this factor, which the plan's seconds omit.
STREAMING_COST = 1.15
RESIDENT_SHARE = 0.7  # of a node's memory that its encoder may use


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a job fits, its predicted seconds, and the predicted peak bytes of the fullest device.

    `costs` has each stage's seconds, if there is a plan.
    """

    fits: bool
    seconds: float = 1.0
    peak_bytes: int = 0
    costs: Costs | None = None


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
        return lambda demand: self.on_hardware(demand, hardware, shape.stage)

    def plan(self, demand: str, hardware: Hardware, stage: Stage = "all") -> Plan:
        """Return the plan of a demand; for stage `decode`, of its decode alone.

        Raises InvalidRequestError or ConfigError.
        """
        config = self._config if hardware.gpus else replace(self._config, devices="cpu")
        if hardware.gpus:
            config = replace(config, devices=None, device_speeds=None)
        if stage == "decode":
            return make_decode_plan(parse_demand(demand, self._memory.spec), self._memory, config, hardware)
        # Do not search for the nearest settings that fit, which takes seconds.
        return make_plan(parse_demand(demand, self._memory.spec), self._memory, config, hardware, nearest=False)

    def _on_hardware(self, demand: str, hardware: Hardware, stage: Stage = "all") -> Fit:
        whole = demand.removeprefix(DECODE)
        if stage == "encode" or (stage == "decode" and whole == demand):
            return NOWHERE
        try:
            plan = self.plan(whole, hardware, stage)
        except InvalidRequestError as error:
            if error.field in ("quantize", "quantize_attention"):
                return NOWHERE  # another card may have this format
            return (
                ANYWHERE if stage == "all" else NOWHERE
            )  # a replica that does whole jobs takes it and reports the error
        except ConfigError:
            return NOWHERE  # the configured strategy needs more devices
        streams = plan.transformer.resident_blocks < self._memory.spec.transformer.num_layers or not plan.both_resident
        slower = STREAMING_COST if streams and plan.prediction.seconds.denoise else 1.0
        costs = Costs(
            plan.prediction.seconds.denoise * slower, plan.prediction.seconds.decode * slower, plan.strategy == "placed"
        )
        seconds = costs.denoise + costs.decode if whole == demand else costs.decode
        return Fit(
            plan.prediction.fits, seconds, max((device.peak for device in plan.prediction.devices), default=0), costs
        )

    def node_costs(self, node: Node, demand: str, gpus: int | None = None) -> NodeCosts:
        """Predict the seconds of a job's stages on a node.

        Whole jobs are predicted for the best shape of replica (of `gpus` GPUs, unless None); decode and encode for
        dedicated replicas.
        """
        demand = demand.removeprefix(DECODE)
        found: list[tuple[tuple[int, int, int], int, Costs]] = []
        for shape in replace(node, stage="all").shapes(gpus):
            fit = self.on(shape)(demand)
            if fit.fits and fit.costs is not None:
                count = max(1, len(node.devices)) // max(1, shape.gpus)
                found.append((preference(shape, fit), count, fit.costs))
        _, count, whole = min(found, key=lambda one: one[0], default=((0, 0, 0), 0, Costs(inf, inf)))
        alone = replace(node, stage="decode")
        decode = self.on(next(iter(alone.shapes())))(DECODE + demand) if node.devices else NOWHERE
        decode_seconds = decode.seconds if decode.fits else inf
        return NodeCosts(
            node.name, count, whole, len(node.devices), decode_seconds, *self._encode_seconds(node, max(1, count))
        )

    def _encode_seconds(self, node: Node, replicas: int) -> tuple[float, float]:
        """Predict seconds between two new prompts on a node: for each replica, and for a dedicated encoder.

        Replicas share the node's cores; an encoder has them to itself (inf: not allowed, or of no use).
        """
        if self._config.model in RANDOM_SPECS:
            return 0.0, inf
        spec, cores = self._memory.spec, min(node.cpu_count, MOST_CORES)
        text = plan_text(spec, self._config)
        read, work = encode_seconds(spec, text.dtype, text.residency)
        beside = max(read + work / cores, replicas * work / cores)  # while one reads, others compute
        if node.wish != "encode" or node.devices or not self._config.cache_embeddings:
            return beside, inf
        read, work = encode_seconds(spec, text.dtype, self.encoder_residency(node.host_bytes))
        return beside, read + work / cores

    def encoder_residency(self, host_bytes: int) -> Literal["resident", "streamed"]:
        """Return where a dedicated encoder keeps the weights: in memory if there is enough."""
        text = plan_text(self._memory.spec, self._config)
        needed = HOST_BASE_BYTES + text_encoder_bytes(self._memory.spec, text.dtype, "resident")
        roomy = self._config.text_encoder_hold == "auto" and needed < RESIDENT_SHARE * host_bytes
        return "resident" if roomy else text.residency


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
