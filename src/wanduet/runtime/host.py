"""Memory of the host: what there is, what is free, and the most that this process has taken."""

import os
import platform
from pathlib import Path


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
