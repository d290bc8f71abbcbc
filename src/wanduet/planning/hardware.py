"""The devices and memory of this machine, or of hardware that a text describes, to plan for machines not at hand."""

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from wanduet.config import parse_bytes
from wanduet.errors import ConfigError, InvalidRequestError
from wanduet.family.attention import FIELD, FORMATS, attention_for
from wanduet.family.step_caches import OFF
from wanduet.planning.cards import Card, card_named, typical_card
from wanduet.planning.host import host_memory

if TYPE_CHECKING:
    from wanduet.distributed.links import Link

# Bytes that a CUDA context and its library handles take outside PyTorch's allocator. Measured on Hopper with CUDA 13
# (see benchmarks/results). Predictions do not include them.
CUDA_CONTEXT_BYTES = 600 * 2**20
MOST_DEVICES = 64  # per host
SMALLEST_DEVICE, LARGEST_DEVICE = 64 * 2**20, 2**40  # "2080 Ti" is a card, and no 2080 TiB
# Bytes a second that each of two ranks sends, and receives, where GPUs cannot write to each other's memory: what a plan
# assumes of a desktop's board. Ranks measure it when they start (`engine.speeds.link_rate`). PCIe 4 x16 carries 25e9 in one
# direction, and each byte crosses it twice; gloo also waits for each copy, and then for the sockets. Two H200s without peer
# access had 35e9 (benchmarks/results/two_gpus_without_peer_access.json).
LINK_RATES: Mapping[str, float] = {"host": 5e9, "gloo": 0.7e9}
ASSUMED = "assumed"  # `host` of described hardware (`parse_hardware`)


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One device. `free_bytes`: what a new process can allocate now."""

    name: str  # PyTorch's device string: "cuda:0", "cpu"
    model: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] = (0, 0)
    multiprocessors: int = 0

    @property
    def is_cpu(self) -> bool:
        """Whether tensors on this device live in host memory."""
        return self.name.startswith("cpu")

    @property
    def has_bfloat16(self) -> bool:
        """Whether the device computes bfloat16 products on matrix units (Ampere and newer)."""
        return self.capability >= (8, 0)


def check_quantize(format: str, device: DeviceInfo) -> None:
    """Raise InvalidRequestError if a GPU has no 8-bit products of a `format` ("off" is allowed). The CPU has none of any
    format, and computes the same results by exact products of values that are rounded alike."""
    needed = {"fp8": (8, 9), "int8": (8, 0)}.get(format)
    if needed is None or device.is_cpu or device.capability >= needed:
        return
    nearest = "int8" if device.capability >= (8, 0) else "off"
    least = ".".join(map(str, needed))
    allowed = f"{device.model} cannot compute {format} products, GPUs of compute capability {least} and later can"
    raise InvalidRequestError("quantize", format, allowed, nearest)


def check_attention(name: str, device: DeviceInfo, requested: str = OFF) -> None:
    """Raise ConfigError if a device cannot run the 8-bit attention that `EngineConfig.attention` names, and
    InvalidRequestError if not the one that the request names instead; the other backends are checked where they run, as they
    depend on what is installed."""
    if attention_for(requested, name) not in FORMATS or (not device.is_cpu and device.capability >= (8, 0)):
        return
    needs = "a GPU of compute capability 8.0 or later"
    if requested != OFF:
        raise InvalidRequestError(FIELD, requested, f"{OFF} on {device.name}: it needs {needs}", OFF)
    raise ConfigError(f"attention={name!r} needs {needs}, not {device.name}.", hint="Leave --attention out.")


@dataclass(frozen=True, slots=True)
class Hardware:
    """The devices a plan may use, best first, and the host."""

    devices: tuple[DeviceInfo, ...]
    host_total_bytes: int
    host_free_bytes: int
    cpu_count: int
    host: str = ""
    link: "Link" = "direct"  # the connection between devices

    @property
    def link_rate(self) -> float | None:
        """The bytes a second that each of two ranks is assumed to send; None where GPUs write to each other's memory."""
        return LINK_RATES.get(self.link)

    def device(self, name: str) -> DeviceInfo:
        """Return the device of that name; `cuda` means `cuda:0`. Raises ConfigError if the machine does not have it."""
        wanted = name if ":" in name or name in ("cpu", "mps") else f"{name}:0"
        if wanted == "cpu":
            return self.cpu
        for device in self.devices:
            if device.name == wanted:
                return device
        has = ", ".join((*(d.name for d in self.devices), "cpu")) if self.devices else "only cpu"
        raise ConfigError(f"There is no device {name!r}; this machine has {has}.")

    @property
    def assumed(self) -> bool:
        """Whether the hardware comes from a description (`parse_hardware`), not from this machine."""
        return self.host == ASSUMED

    @property
    def cpu(self) -> DeviceInfo:
        """The host as a device."""
        return DeviceInfo("cpu", self.host, self.host_total_bytes, self.host_free_bytes)

    @property
    def gpus(self) -> tuple[DeviceInfo, ...]:
        """All devices except the host."""
        return tuple(d for d in self.devices if not d.is_cpu)


def detect() -> Hardware:
    """Return the devices and memory of this machine."""
    import torch

    from wanduet.distributed.links import link_between

    devices: list[DeviceInfo] = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            capability = (properties.major, properties.minor)
            name = f"cuda:{index}"
            devices.append(DeviceInfo(name, properties.name, total, free, capability, properties.multi_processor_count))
    elif torch.backends.mps.is_available():
        total, free = host_memory()
        devices.append(DeviceInfo("mps", "Apple GPU", total, free))
    total, free = host_memory()
    link = link_between([torch.device(device.name) for device in devices])
    return Hardware(tuple(devices), total, free, os.cpu_count() or 1, _cpu_model(), link)


def parse_hardware(text: str, host: Hardware | None = None) -> Hardware:
    """Parse a description of hardware.

    Examples: `2x24GiB`, `RTX 4090`, `2x3090`, `24` (GiB), `24GiB+12GiB`, `h100,ram=32GiB`, `cpu`.
    A memory size alone stands for a common card of that size (`cards.typical_card`). Without `ram=`, the host memory is
    that of `host`, or 32 GiB. Raises ConfigError.
    """
    found: list[tuple[Card, int]] = []
    ram = host.host_total_bytes if host else 32 * 2**30
    for part in (part.strip() for part in re.split(r"[,+]", text)):
        if re.fullmatch(r"ram\s*=.*", part, re.IGNORECASE):
            ram = parse_bytes(part.partition("=")[2])
        elif part.lower() != "cpu":
            match = re.fullmatch(r"(?:(\d{1,4})\s*[x×*]\s*)?(.+)", part, re.IGNORECASE | re.ASCII)
            count = int(match[1] or 1) if match else 0
            if match is None or not 1 <= count <= MOST_DEVICES:
                hint = f"Examples: 2x24GiB, 24GiB+12GiB, 2xRTX 3090; 1 to {MOST_DEVICES} devices."
                raise ConfigError(f"hardware={text!r} is not understood.", hint=hint)
            found += [_assumed_card(match[2])] * count
    devices = (
        DeviceInfo(f"cuda:{i}", card.name, size, size - CUDA_CONTEXT_BYTES, card.capability, card.multiprocessors)
        for i, (card, size) in enumerate(found)
    )
    link: Link = "direct" if all(card.reaches_peers for card, _ in found) else "host"
    return Hardware(tuple(devices), ram, int(ram * 0.85), os.cpu_count() or 1, ASSUMED, link)


def _assumed_card(text: str) -> tuple[Card, int]:
    """Return the card that a name or a memory size describes, and its memory in bytes. Raises ConfigError."""
    if card := card_named(text):
        return card, card.total_bytes
    amount = f"{text}GiB" if re.fullmatch(r"\d{1,3}(\.\d+)?", text, re.ASCII) else text
    try:
        size = parse_bytes(amount)
    except ConfigError:
        size = 0
    if not SMALLEST_DEVICE <= size < LARGEST_DEVICE:
        hint = "Examples: 2x24GiB, 24GiB+12GiB, RTX 3090, 2x4090, H100."
        raise ConfigError(f"hardware: {text!r} is neither a card that is known nor the memory of one.", hint=hint)
    return typical_card(size), size


def device_model(name: str) -> str:
    """Return the model of a device of this machine, by PyTorch's name of it ("cuda:0", "cpu")."""
    if name.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(name)
    return "Apple GPU" if name == "mps" else _cpu_model()


@lru_cache(maxsize=1)
def _cpu_model() -> str:
    if platform.system() == "Linux":
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
