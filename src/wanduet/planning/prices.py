"""What sets of approximations lose with given weights, as measured on this machine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wanduet.config import EngineConfig, parse_devices
from wanduet.family.speeds import Price
from wanduet.meta.prices import share_of_time, worst_of
from wanduet.planning.hardware import Hardware


def loss_of(folder: Path, model_hash: str | None, settings: Mapping[str, Any]) -> Price | None:
    """Return what a set of approximations loses with the weights of a hash (None: random weights); None if that was not measured.

    It is the worst of all sizes and steps that `wanduet price` measured with these weights. `folder`: of measurements.
    """
    if model_hash is None:
        return None
    found = worst_of(folder, model_hash, settings, "psnr")
    if found is None:
        return None
    psnr, job = found
    where = f" at {job}" if job else ""
    return Price(psnr, "worst", f"measured on this machine{where}", share_of_time(folder, model_hash, settings))


def has_fast_8_bit_attention(config: EngineConfig, hardware: Hardware) -> bool:
    """Return whether attention in 8 bits may be faster than exact attention on all devices that an engine may use, whose
    settings leave the choice of attention open: GPUs of compute capability 8.0 to 8.9, and from 12.0 on."""
    named = parse_devices(config.devices).names
    names = {name if ":" in name or name == "cpu" else f"{name}:0" for name in named}
    used = [device for device in hardware.gpus if not named or device.name in names]
    is_on_cpu = bool(names - {device.name for device in used}) or not used
    return (
        config.attention == "auto"
        and not is_on_cpu
        and all((8, 0) <= device.capability < (9, 0) or device.capability >= (12, 0) for device in used)
    )
