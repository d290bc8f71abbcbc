"""What the machine has: devices, their memory, the host. Also hardware that is not here, for planning."""

import os
import platform
import re
from dataclasses import dataclass
from functools import lru_cache

from wanduet.config import parse_bytes
from wanduet.errors import ConfigError

# What a CUDA context and its libraries' handles take outside PyTorch's allocator, in bytes. Measured
# on Hopper with CUDA 13 (see benchmarks/results); counted apart from every prediction.
CUDA_CONTEXT_BYTES = 600 * 2**20
MOST_DEVICES = 64  # of one host
SMALLEST_DEVICE = 64 * 2**20


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

    def device(self, name: str) -> DeviceInfo:
        """A device by name (`cuda` means `cuda:0`). Raises ConfigError if the machine does not have it."""
        wanted = name if ":" in name or name in ("cpu", "mps") else f"{name}:0"
        if wanted == "cpu":
            return self.cpu
        for device in self.devices:
            if device.name == wanted:
                return device
        has = ", ".join(d.name for d in self.devices) or "no GPU"
        raise ConfigError(f"There is no device {name!r}; this machine has {has} and cpu.")

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
    return Hardware(tuple(devices), total, free, os.cpu_count() or 1, _cpu_model())


def parse_hardware(text: str, host: Hardware | None = None) -> Hardware:
    """Hardware that is not here: `2x24GiB`, `1x8GiB`, `24GiB+12GiB`, `2x24GiB,ram=32GiB`, `cpu,ram=16GiB`."""
    sizes: list[int] = []
    ram = host.host_total_bytes if host else 32 * 2**30
    for part in re.split(r"[,+]", text.replace(" ", "")):
        if part.lower().startswith("ram="):
            ram = parse_bytes(part[4:])
        elif part.lower() != "cpu":
            match = re.fullmatch(r"(?:(\d{1,4})[x×*])?(.+)", part, re.IGNORECASE | re.ASCII)
            count = int(match[1] or 1) if match else 0
            if match is None or not 1 <= count <= MOST_DEVICES:
                hint = f"Examples: 2x24GiB, 24GiB+12GiB; 1 to {MOST_DEVICES} devices."
                raise ConfigError(f"hardware={text!r} is not understood.", hint=hint)
            sizes += [_device_bytes(match[2])] * count
    # 8.6 is the RTX 3090's generation, the least the project promises to run on.
    devices = (
        DeviceInfo(f"cuda:{i}", "assumed", size, size - CUDA_CONTEXT_BYTES, (8, 6), 82) for i, size in enumerate(sizes)
    )
    return Hardware(tuple(devices), ram, int(ram * 0.85), os.cpu_count() or 1, "assumed")


def _device_bytes(text: str) -> int:
    """A GPU's memory. Raises ConfigError."""
    size = parse_bytes(text)
    if size < SMALLEST_DEVICE:
        raise ConfigError(f"hardware: no GPU has {text}.", hint="Examples: 2x24GiB, 24GiB+12GiB.")
    return size


def host_memory() -> tuple[int, int]:
    """`(total, available)` bytes of host memory, respecting a container's limit."""
    total, available = _os_memory()
    limit = _cgroup_limit()
    if limit is not None and limit < total:
        return limit, min(available, limit)
    return total, available


def process_peak_bytes() -> int:
    """The most memory this process has had resident so far (0 where the system does not say)."""
    if platform.system() == "Windows":
        return 0
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


def _cgroup_limit() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as file:
                text = file.read().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


@lru_cache(maxsize=1)
def _cpu_model() -> str:
    if platform.system() == "Linux":
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
