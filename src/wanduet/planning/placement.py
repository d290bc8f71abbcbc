"""Chooses the devices: one for all models, one for each model, or several that share one video."""

from dataclasses import dataclass
from itertools import permutations
from typing import Literal

from wanduet.config import EngineConfig, parse_devices
from wanduet.distributed.links import attention_comm_bytes
from wanduet.distributed.mesh import choose_layout
from wanduet.errors import ConfigError
from wanduet.family.spec import ModelSpec
from wanduet.planning.cost import rate
from wanduet.planning.hardware import DeviceInfo, Hardware
from wanduet.request import ResolvedRequest

StrategyName = Literal["single", "placed", "parallel"]
PAIRED = 4  # number of fastest devices that are paired as (transformer, VAE)
# Relative time of a step whose sequence is split over GPUs that write to each other's memory, because of the exchanges.
SEQUENCE_COST = 1.06


@dataclass(frozen=True, slots=True)
class Placement:
    """The devices of transformer and VAE; `ranks` are the devices of strategy `parallel`."""

    strategy: StrategyName
    transformer: DeviceInfo
    vae: DeviceInfo
    ranks: tuple[DeviceInfo, ...] = ()

    @property
    def shared(self) -> bool:
        """Whether one device runs both models."""
        return self.transformer.name == self.vae.name


def find_placements(config: EngineConfig, hardware: Hardware) -> tuple[Placement, ...]:
    """Return the placements to try, best first: a later one applies if the earlier ones do not fit.

    Raises ConfigError if the hardware does not have what `config` requires.
    """
    requested = parse_devices(config.devices)
    names = requested.names or tuple(d.name for d in hardware.gpus) or ("cpu",)
    devices = tuple(hardware.device(name) for name in names)
    vae, transformer = requested.role("vae"), requested.role("transformer")
    if vae or transformer:
        first, second = hardware.device(vae or transformer or ""), hardware.device(transformer or vae or "")
        shared = first.name == second.name and not first.is_cpu
        strategy: StrategyName = "single" if shared else "placed"
        return (Placement(strategy, second, first),)
    if config.strategy == "placed" and len(devices) == 1:
        if not devices[0].is_cpu:
            raise ConfigError("--strategy placed needs two devices.", hint="Name them: --devices cuda:0,cuda:1.")
        return (Placement("placed", devices[0], devices[0]),)
    ranked = sorted(devices, key=lambda d: (rate(d), d.free_bytes), reverse=True)
    if config.strategy == "single" or len(devices) == 1:
        return tuple(Placement("single", device, device) for device in ranked)
    placed = tuple(Placement("placed", transformer, vae) for transformer, vae in _pairs(devices))
    if config.strategy == "placed":
        return placed
    return placed + tuple(Placement("single", device, device) for device in ranked)


def _pairs(devices: tuple[DeviceInfo, ...]) -> tuple[tuple[DeviceInfo, DeviceInfo], ...]:
    """Return `(transformer, vae)` devices, best first.

    The denoise is over nine tenths of the work: it gets the fastest.
    """

    def speed(device: DeviceInfo) -> tuple[object, ...]:
        return rate(device), device.capability, device.total_bytes

    ranked = sorted(devices, key=speed, reverse=True)[:PAIRED]
    first, second = ranked[:2]
    if speed(first) == speed(second):  # equal cards: the one that is named first decodes
        first, second = second, first
    return tuple(dict.fromkeys([(first, second), (second, first), *permutations(ranked, 2)]))


def parallel_placement(request: ResolvedRequest, config: EngineConfig, hardware: Hardware) -> Placement | None:
    """Return a placement of one video on several devices; None if `config` excludes it or it is not the fastest.

    Raises ConfigError if `config.strategy` is `parallel` and there are fewer than two devices, or they have roles.
    """
    requested = parse_devices(config.devices)
    names = requested.names or tuple(d.name for d in hardware.gpus)
    devices = tuple(hardware.device(name) for name in names)
    is_required = config.strategy == "parallel"
    if len(devices) < 2 or requested.roles:
        if is_required:
            raise ConfigError(
                "--strategy parallel needs at least two devices, without roles.",
                hint="Examples: --devices cuda:0,cuda:1, or cpu,cpu to try it without a GPU.",
            )
        return None
    if is_required:
        return Placement("parallel", devices[0], devices[0], devices)
    if len({(d.model, d.capability, d.total_bytes) for d in devices}) > 1:
        return None  # cards of different models: each gets the part that suits it
    if not request.uses_guidance and hardware.link != "direct":
        return None  # without guidance ranks exchange the sequence in every block, which slow links may make slower
    return Placement("parallel", devices[0], devices[0], devices)


def pairs_up(rates: tuple[float, ...], cost: float = SEQUENCE_COST) -> bool:
    """Return True if one guidance branch on each half of the devices is faster than one sequence split over all.

    `rates`: the speeds of the devices, by which a sequence is split. Two branches take as long as the slower half needs
    for one of them; a split sequence takes `cost` times as long as it would without its exchanges.
    """
    half = len(rates) // 2
    halves = (sum(rates[:half]), sum(rates[half:]))
    return half > 0 and 1 / min(halves) <= cost * 2 / sum(rates)


def sequence_cost(
    request: ResolvedRequest, spec: ModelSpec, ranks: int, item: int, step_s: float, link_rate: float | None
) -> float:
    """Return how many times longer a guided step takes, because of its exchanges, with one sequence split over all
    ranks than with two guidance branches. `step_s`: predicted seconds of a step with branches. `item`: bytes of an
    activation value. `link_rate`: bytes a second, None where GPUs write to each other's memory."""
    if link_rate is None:
        return SEQUENCE_COST
    t = spec.transformer
    tokens = spec.num_tokens(request.generated_height, request.generated_width, request.num_frames)
    whole, pairs = (choose_layout(ranks, t.num_attention_heads, guided) for guided in (False, True))
    # With a split sequence each rank has both prompts, with branches one.
    sent = [prompts * attention_comm_bytes(layout, tokens, t.dim, item) for prompts, layout in ((2, whole), (1, pairs))]
    more = t.num_layers * (sent[0] - sent[1])
    return max(SEQUENCE_COST, 1 + more / link_rate / step_s)
