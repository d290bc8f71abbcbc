"""Host memory: total and available bytes, and the peak of this process."""

import platform
from pathlib import Path

import psutil


def host_memory() -> tuple[int, int]:
    """Return `(total, available)` bytes of host memory, within the limits of a container or a batch system's job."""
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    for limit, used in _cgroup_limits():
        if limit < total:
            total = limit
        available = min(available, max(0, limit - used))
    return total, available


def process_peak_bytes() -> int:
    """Return the peak resident memory of this process so far, in bytes."""
    if platform.system() == "Windows":
        return int(psutil.Process().memory_info().peak_wset)
    if platform.system() == "Linux":  # getrusage would include the parent process's memory before exec
        with open("/proc/self/status") as file:
            peak = next((line.split()[1] for line in file if line.startswith("VmHWM")), "0")
        return int(peak) * 1024
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # macOS counts bytes


def _cgroup_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[tuple[int, int]]:
    """Return `(limit, used)` bytes of this process's control group and of its ancestors.

    File pages that the kernel can drop from the page cache count as free.
    """
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
        here = top / path.strip("/")  # in a container, often the host's path, which is not visible
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
