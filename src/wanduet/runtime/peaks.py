"""The most memory that was taken while a job ran, by device: of that job, not of what ran before it in this process.

Counters of peaks hold for the process, and jobs overlap. So when a job begins, what was seen so far is written down for the
jobs that run already, and the counters begin anew. (The counters are PyTorch's and, on Linux, the system's for this process;
a program that reads them itself sees them begin anew, too.)
"""

import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from wanduet.planning.host import process_peak_bytes

Peaks = dict[str, int]
CLEAR = Path("/proc/self/clear_refs")  # "5" lets the system's count of this process's peak begin anew


class PeakMemory:
    """Peaks of jobs; those of all engines are in PEAKS. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, Peaks] = {}

    def begin(self, job: str) -> None:
        """From now on, until `end`, what is taken counts for this job."""
        with self._lock:
            now = look()
            for peaks in self._open.values():
                join(peaks, now)
            reset()
            self._open[job] = {}

    def end(self, job: str, elsewhere: Mapping[str, int] | None = None) -> Peaks:
        """The job's peak bytes by device: what the allocator had reserved on GPUs, resident memory on the host.

        `elsewhere`: what processes of a group have seen (see `add_up`). On the host they add up; a device counts what the
        one that took most of it had. A job that was never begun gets the peaks since the last that was.
        """
        with self._lock:
            peaks = join(self._open.pop(job, {}), look())
        others = dict(elsewhere or {})
        peaks["cpu"] += others.pop("cpu", 0)
        return join(peaks, others)

    def forget(self, job: str) -> None:
        """The job has ended in another way, or `end` was called."""
        with self._lock:
            self._open.pop(job, None)


PEAKS = PeakMemory()
"""The jobs of this process, whose counters every engine sets back."""


def look() -> Peaks:
    """Peaks of this process since the counters began."""
    peaks = {"cpu": process_peak_bytes()}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if reserved := torch.cuda.max_memory_reserved(index):
                peaks[f"cuda:{index}"] = reserved
    return peaks


def reset() -> None:
    """Let the counters of this process begin with what is taken now."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    if sys.platform == "linux":
        with suppress(OSError):  # not allowed in some containers: the host's peak is then that of the process's life
            CLEAR.write_text("5")


def join(peaks: Peaks, others: Mapping[str, int]) -> Peaks:
    """`peaks`, raised to those of others where they are higher."""
    for device, size in others.items():
        peaks[device] = max(peaks.get(device, 0), size)
    return peaks


def add_up(said: Sequence[Mapping[str, int]]) -> Peaks:
    """Of processes with a device each, who share the host."""
    peaks = {"cpu": sum(one.get("cpu", 0) for one in said)}
    for one in said:
        join(peaks, {name: size for name, size in one.items() if name != "cpu"})
    return peaks
