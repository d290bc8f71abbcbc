"""Which device does what: one for all, one for each model, or all together on one video."""

from dataclasses import dataclass
from typing import Literal

from wanduet.config import EngineConfig, parse_devices
from wanduet.engine.hardware import DeviceInfo, Hardware
from wanduet.errors import ConfigError
from wanduet.request import ResolvedRequest

StrategyName = Literal["single", "placed", "parallel"]
SEQUENCE_COST = 1.06  # what the exchanges of a shared sequence add


@dataclass(frozen=True, slots=True)
class Placement:
    """Where transformer and VAE run, and why; `ranks` are the devices of strategy `parallel`."""

    strategy: StrategyName
    transformer: DeviceInfo
    vae: DeviceInfo
    why: str
    ranks: tuple[DeviceInfo, ...] = ()

    @property
    def shared(self) -> bool:
        """Whether one device does both."""
        return self.transformer.name == self.vae.name


def find_placement(config: EngineConfig, hardware: Hardware) -> Placement:
    """Which device denoises and which decodes. Raises ConfigError where the wish cannot be met."""
    asked = parse_devices(config.devices)
    names = asked.names or tuple(d.name for d in hardware.gpus) or ("cpu",)
    devices = tuple(hardware.device(name) for name in names)
    vae, transformer = asked.role("vae"), asked.role("transformer")
    if vae or transformer:
        first, second = hardware.device(vae or transformer or ""), hardware.device(transformer or vae or "")
        shared = first.name == second.name and not first.is_cpu
        strategy: StrategyName = "single" if shared else "placed"
        return Placement(strategy, second, first, "the devices' roles were named")
    if config.strategy == "single" or len(devices) == 1:
        if config.strategy == "placed" and len(devices) == 1 and not devices[0].is_cpu:
            raise ConfigError("--strategy placed needs two devices.", hint="Name them: --devices cuda:0,cuda:1.")
        best = max(devices, key=lambda d: (d.multiprocessors, d.free_bytes))
        why = "asked for" if config.strategy == "single" else f"{best.name} is the only device"
        return Placement("single", best, best, why)
    # The denoise is more than nine tenths of the work: it gets the faster card.
    ranked = sorted(devices[:2], key=lambda d: (d.multiprocessors, d.capability, d.total_bytes))
    return Placement("placed", ranked[1], ranked[0], "VAE and transformer each have a device of their own")


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
        return Placement("parallel", devices[0], devices[0], "asked for", devices)
    if len({(d.model, d.capability, d.total_bytes) for d in devices}) > 1 or not (
        request.uses_guidance or devices[0].is_cpu
    ):
        return None  # unlike cards: each gets the part that suits it
    why = f"{len(devices)} equal devices denoise one video together: each branch of the guidance on its own"
    return Placement("parallel", devices[0], devices[0], why, devices)


def pairs_up(rates: tuple[float, ...]) -> bool:
    """Whether a branch of the guidance on each half is faster than one sequence cut by speed.

    A pair of branches takes as long as the slower half needs for one; a shared sequence costs its exchanges.
    """
    half = len(rates) // 2
    halves = (sum(rates[:half]), sum(rates[half:]))
    return half > 0 and 1 / min(halves) <= SEQUENCE_COST * 2 / sum(rates)
