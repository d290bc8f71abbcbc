"""Which device does what: one for all, one for each model, or all together on one video."""

from dataclasses import dataclass
from itertools import permutations
from typing import Literal

from wanduet.config import EngineConfig, parse_devices
from wanduet.distributed.links import Link, attention_comm_bytes
from wanduet.distributed.mesh import choose_layout
from wanduet.errors import ConfigError
from wanduet.family.specs import ModelSpec
from wanduet.planning.cost import rate
from wanduet.planning.hardware import DeviceInfo, Hardware
from wanduet.request import ResolvedRequest

StrategyName = Literal["single", "placed", "parallel"]
PAIRED = 4  # of many devices, those that are looked at for the two parts
SEQUENCE_COST = 1.06  # what the exchanges of a shared sequence add between GPUs that write to each other's memory
# Bytes a second that each of two ranks sends, and receives, where they do not. Assumed: there was no such machine to measure.
# PCIe 4 x16 carries 25e9 one way, and each byte passes it twice; gloo waits for each copy, and then for the sockets.
LINK_RATES = {"host": 5e9, "gloo": 0.7e9}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where transformer and VAE run; `ranks` are the devices of strategy `parallel`."""

    strategy: StrategyName
    transformer: DeviceInfo
    vae: DeviceInfo
    ranks: tuple[DeviceInfo, ...] = ()

    @property
    def shared(self) -> bool:
        """Whether one device does both."""
        return self.transformer.name == self.vae.name


def find_placements(config: EngineConfig, hardware: Hardware) -> tuple[Placement, ...]:
    """Which device denoises and which decodes, best first: a later one is for where the ones before do not fit.

    Raises ConfigError where the wish cannot be met.
    """
    asked = parse_devices(config.devices)
    names = asked.names or tuple(d.name for d in hardware.gpus) or ("cpu",)
    devices = tuple(hardware.device(name) for name in names)
    vae, transformer = asked.role("vae"), asked.role("transformer")
    if vae or transformer:
        first, second = hardware.device(vae or transformer or ""), hardware.device(transformer or vae or "")
        shared = first.name == second.name and not first.is_cpu
        strategy: StrategyName = "single" if shared else "placed"
        return (Placement(strategy, second, first),)
    if config.strategy == "placed" and len(devices) == 1:
        if not devices[0].is_cpu:
            raise ConfigError("--strategy placed needs two devices.", hint="Name them: --devices cuda:0,cuda:1.")
        return (Placement("placed", devices[0], devices[0]),)
    alone = sorted(devices, key=lambda d: (rate(d), d.free_bytes), reverse=True)
    if config.strategy == "single" or len(devices) == 1:
        return tuple(Placement("single", device, device) for device in alone)
    placed = tuple(Placement("placed", transformer, vae) for transformer, vae in _pairs(devices))
    if config.strategy == "placed":
        return placed
    return placed + tuple(Placement("single", device, device) for device in alone)


def _pairs(devices: tuple[DeviceInfo, ...]) -> tuple[tuple[DeviceInfo, DeviceInfo], ...]:
    """`(transformer, vae)` devices. The denoise is more than nine tenths of the work: it gets the fastest card."""

    def speed(device: DeviceInfo) -> tuple[object, ...]:
        return rate(device), device.capability, device.total_bytes

    ranked = sorted(devices, key=speed, reverse=True)[:PAIRED]
    first, second = ranked[:2]
    if speed(first) == speed(second):  # in the order they were named: the VAE's first
        first, second = second, first
    return tuple(dict.fromkeys([(first, second), (second, first), *permutations(ranked, 2)]))


def parallel_placement(request: ResolvedRequest, config: EngineConfig, hardware: Hardware) -> Placement | None:
    """Several devices for one video; None where that is not what is wanted or not the fastest way.

    Raises ConfigError where it was asked for and there is one device.
    """
    asked = parse_devices(config.devices)
    names = asked.names or tuple(d.name for d in hardware.gpus)
    devices = tuple(hardware.device(name) for name in names)
    asked_for = config.strategy == "parallel"
    if len(devices) < 2 or asked.roles:
        if asked_for:
            raise ConfigError(
                "--strategy parallel needs at least two devices, without roles.",
                hint="Examples: --devices cuda:0,cuda:1, or cpu,cpu to try it without a GPU.",
            )
        return None
    if asked_for:
        return Placement("parallel", devices[0], devices[0], devices)
    if len({(d.model, d.capability, d.total_bytes) for d in devices}) > 1 or not (
        request.uses_guidance or devices[0].is_cpu
    ):
        return None  # unlike cards: each gets the part that suits it
    return Placement("parallel", devices[0], devices[0], devices)


def pairs_up(rates: tuple[float, ...], cost: float = SEQUENCE_COST) -> bool:
    """Whether a branch of the guidance on each half is faster than one sequence cut by speed.

    A pair of branches takes as long as the slower half needs for one; a shared sequence takes `cost` times as long as
    without its exchanges.
    """
    half = len(rates) // 2
    halves = (sum(rates[:half]), sum(rates[half:]))
    return half > 0 and 1 / min(halves) <= cost * 2 / sum(rates)


def sequence_cost(request: ResolvedRequest, spec: ModelSpec, ranks: int, item: int, step_s: float, link: Link) -> float:
    """How many times as long a guided step takes in one sequence over all ranks, for its exchanges, as in two branches
    of predicted `step_s` seconds; with activations of `item` bytes a value."""
    if link == "direct":
        return SEQUENCE_COST
    t = spec.transformer
    tokens = spec.num_tokens(request.generated_height, request.generated_width, request.num_frames)
    whole, pairs = (choose_layout(ranks, t.num_attention_heads, guided) for guided in (False, True))
    # Each rank has both prompts, or one.
    sent = [prompts * attention_comm_bytes(layout, tokens, t.dim, item) for prompts, layout in ((2, whole), (1, pairs))]
    more = t.num_layers * (sent[0] - sent[1])
    return max(SEQUENCE_COST, 1 + more / LINK_RATES[link] / step_s)
