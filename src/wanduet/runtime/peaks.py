"""Peak memory of each job by device, without the peaks of earlier jobs in this process.

Peak counters are per process, and jobs overlap. So when a job begins, the peaks so far are added to all running jobs,
and the counters are reset. (The counters are PyTorch's and, on Linux, the kernel's for this process. Other readers of
these counters see the reset, too.)
"""

import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from wanduet.planning.host import process_peak_bytes

Peaks = dict[str, int]
CLEAR = Path("/proc/self/clear_refs")  # writing "5" resets the kernel's peak counter of this process


class PeakMemory:
    """Memory peaks of the running jobs. All engines of a process share PEAKS. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, Peaks] = {}

    def begin(self, job: str) -> None:
        """Start recording a job's peaks."""
        with self._lock:
            now = look()
            for peaks in self._open.values():
                join(peaks, now)
            reset()
            self._open[job] = {}

    def end(self, job: str, of_ranks: Mapping[str, int] | None = None) -> Peaks:
        """Stop recording. Return the job's peak bytes by device: memory reserved by the allocator on GPUs, resident
        memory on the host.

        `of_ranks`: peaks of the processes of a group (see `add_up`), which are added to this process's: its text encoder
        may be on a rank's GPU. Without a `begin`, return the peaks since the last `begin` of any job.
        """
        with self._lock:
            peaks = join(self._open.pop(job, {}), look())
        for device, size in (of_ranks or {}).items():
            peaks[device] = peaks.get(device, 0) + size
        return peaks

    def forget(self, job: str) -> None:
        """Stop recording without a result, for a failed job. Does nothing after `end`."""
        with self._lock:
            self._open.pop(job, None)


PEAKS = PeakMemory()
"""The peaks of all jobs of this process: its engines share one set of counters."""


def look() -> Peaks:
    """Return the peak bytes of this process by device since the last `reset`."""
    peaks = {"cpu": process_peak_bytes()}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if reserved := torch.cuda.max_memory_reserved(index):
                peaks[f"cuda:{index}"] = reserved
    return peaks


def reset() -> None:
    """Reset the peak counters of this process to the current use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    if sys.platform == "linux":
        with suppress(OSError):  # some containers forbid it: the host's peak is then the process's since its start
            CLEAR.write_text("5")


def join(peaks: Peaks, others: Mapping[str, int]) -> Peaks:
    """Raise `peaks` in place to those of `others` where they are higher, and return it."""
    for device, size in others.items():
        peaks[device] = max(peaks.get(device, 0), size)
    return peaks


def add_up(reports: Sequence[Mapping[str, int]]) -> Peaks:
    """Combine the peaks of processes: the sum for the host, which they share, and the maximum for each device."""
    peaks = {"cpu": sum(one.get("cpu", 0) for one in reports)}
    for one in reports:
        join(peaks, {name: size for name, size in one.items() if name != "cpu"})
    return peaks
