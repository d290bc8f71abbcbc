"""What the machine has: devices, their memory, the host. Also hardware that is not here, for planning."""

import os
import platform
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from wanduet.config import parse_bytes
from wanduet.engine.cards import Card, card_named, typical_card
from wanduet.errors import ConfigError

if TYPE_CHECKING:
    from wanduet.parallel.links import Link

# What a CUDA context and its libraries' handles take outside PyTorch's allocator, in bytes. Measured
# on Hopper with CUDA 13 (see benchmarks/results); counted apart from every prediction.
CUDA_CONTEXT_BYTES = 600 * 2**20
MOST_DEVICES = 64  # of one host
SMALLEST_DEVICE = 64 * 2**20
ASSUMED = "assumed"  # the name of a host and its devices that are not here


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One device. `free_bytes` is what a new process could allocate now."""

    name: str  # as torch names it: "cuda:0", "cpu"
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
        """Whether bfloat16 products run on matrix units (Ampere and newer)."""
        return self.capability >= (8, 0)


@dataclass(frozen=True, slots=True)
class Hardware:
    """The devices a plan may use, best first, and the host."""

    devices: tuple[DeviceInfo, ...]
    host_total_bytes: int
    host_free_bytes: int
    cpu_count: int
    host: str = ""
    link: "Link" = "direct"  # what joins its devices; assumed of those that are not here

    def device(self, name: str) -> DeviceInfo:
        """A device by name (`cuda` means `cuda:0`). Raises ConfigError if the machine does not have it."""
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
        """Whether it is not this machine's, but what somebody described (`parse_hardware`)."""
        return self.host == ASSUMED

    @property
    def cpu(self) -> DeviceInfo:
        """The host as a device."""
        return DeviceInfo("cpu", self.host, self.host_total_bytes, self.host_free_bytes)

    @property
    def gpus(self) -> tuple[DeviceInfo, ...]:
        """The devices that are not the host."""
        return tuple(d for d in self.devices if not d.is_cpu)


def detect() -> Hardware:
    """Look at this machine."""
    import torch

    from wanduet.parallel.links import link_between

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
    """Hardware that is not here: `2x24GiB`, `RTX 4090`, `2x3090`, `24` (GiB), `24GiB+12GiB`, `h100,ram=32GiB`, `cpu`.

    A card of which only the memory is known is taken for a common one with so much (`cards.typical_card`). Raises ConfigError.
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
    return Hardware(tuple(devices), ram, int(ram * 0.85), os.cpu_count() or 1, ASSUMED)


def _assumed_card(text: str) -> tuple[Card, int]:
    """A card, and its memory in bytes, from its name or its memory. Raises ConfigError."""
    if card := card_named(text):
        return card, card.total_bytes
    amount = f"{text}GiB" if re.fullmatch(r"\d{1,3}(\.\d+)?", text, re.ASCII) else text
    try:
        size = parse_bytes(amount)
    except ConfigError:
        size = 0
    if size < SMALLEST_DEVICE:
        hint = "Examples: 2x24GiB, 24GiB+12GiB, RTX 3090, 2x4090, H100."
        raise ConfigError(f"hardware: {text!r} is neither a card that is known nor the memory of one.", hint=hint)
    return typical_card(size), size


def host_memory() -> tuple[int, int]:
    """`(total, available)` bytes of host memory, respecting the limits of a container or a batch system's job."""
    total, available = _os_memory()
    for limit, used in _cgroup_limits():
        if limit < total:
            total = limit
        available = min(available, max(0, limit - used))
    return total, available


def process_peak_bytes() -> int:
    """The most memory this process has had resident so far."""
    if platform.system() == "Windows":
        return _windows_peak_bytes()
    if platform.system() == "Linux":  # getrusage would count what the starting process had before exec
        with open("/proc/self/status") as file:
            peak = next((line.split()[1] for line in file if line.startswith("VmHWM")), "0")
        return int(peak) * 1024
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # macOS counts bytes


def _os_memory() -> tuple[int, int]:
    if platform.system() == "Linux":
        with open("/proc/meminfo") as file:
            fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
        return fields["MemTotal"], fields["MemAvailable"]
    if platform.system() == "Windows":
        return _windows_memory()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total, total // 2  # macOS tells no simple "available"


def _windows_memory() -> tuple[int, int]:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong)
            for name in ("total", "available", "page_total", "page_free", "virtual_total", "virtual_free", "extended")
        ]

    status = Status(length=ctypes.sizeof(Status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return int(status.total), int(status.available)


def _windows_peak_bytes() -> int:
    import ctypes

    class Counters(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("page_faults", ctypes.c_ulong)] + [
            (name, ctypes.c_size_t)
            for name in ("peak_resident", "resident", "peak_paged", "paged", "peak_nonpaged", "nonpaged", "file", "peak_file")
        ]  # fmt: skip

    kernel32 = ctypes.windll.kernel32  # type: ignore[attr-defined]
    counters = Counters(length=ctypes.sizeof(Counters))
    this_process = ctypes.c_void_p(-1)  # what GetCurrentProcess gives, as wide as a handle is
    kernel32.K32GetProcessMemoryInfo(this_process, ctypes.byref(counters), ctypes.c_ulong(counters.length))
    return int(counters.peak_resident)


def _cgroup_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[tuple[int, int]]:
    """`(limit, used)` bytes of this process's control group and of those around it. Files that can be thrown out
    of the page cache count as free."""
    found: list[tuple[int, int]] = []
    for line in _lines(own):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number != "0" and "memory" not in controllers.split(","):
            continue
        top = root if number == "0" else root / "memory"
        names = (
            ("memory.max", "memory.current") if number == "0" else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        here = top / path.strip("/")  # in a container the path is often that of the host, which is not seen here
        for folder in dict.fromkeys([*(p for p in (here, *here.parents) if p.is_relative_to(top)), top]):
            limit, used = ("".join(_lines(folder / name)) for name in names)
            if limit.isdecimal() and used.isdecimal():
                stat = dict(entry.split(" ", 1) for entry in _lines(folder / "memory.stat") if " " in entry)
                cached = stat.get("inactive_file") or stat.get("total_inactive_file") or "0"
                found.append((int(limit), max(0, int(used) - int(cached))))
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []


@lru_cache(maxsize=1)
def _cpu_model() -> str:
    if platform.system() == "Linux":
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
