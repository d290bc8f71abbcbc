"""Which workers are alive: heartbeats timed by the watcher itself, and file locks that end with a process.

No two clocks are compared. A watcher adds up the time in which it has itself seen a heartbeat unchanged, so neither a
jump of the wall clock nor a pause of the machine or of the watcher makes a lease expire.
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from wanduet.folders import is_unlocked
from wanduet.jobs.records import Pulse

# A heartbeat must be unchanged in at least this many looks. One long gap between two looks proves nothing: the watcher
# may have been paused together with the worker.
LOOKS = 4
SWEEP_SECONDS = 3600.0


@dataclass(slots=True)
class _Quiet:
    token: int
    beat: int
    seconds: float = 0.0


class LeaseWatch:
    """Finds leases of dead workers. Each watcher needs its own; `monotonic` returns seconds that never decrease."""

    def __init__(self, workers: Path, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._workers = workers
        self._monotonic = monotonic
        self._looked: float | None = None
        self._quiet: dict[str, _Quiet] = {}
        self._guard = threading.Lock()

    def look(self, pulses: Iterable[Pulse]) -> list[Pulse]:
        """Return the leases of dead workers. Call it a few times in each lease's length.

        A lease is dead once its heartbeat was unchanged for the lease's length, or at once if its worker ran on this
        machine and its lock is free.
        """
        with self._guard:
            now = self._monotonic()
            passed = 0.0 if self._looked is None else max(0.0, now - self._looked)
            self._looked = now
            seen: dict[str, _Quiet] = {}
            dead: list[Pulse] = []
            for pulse in pulses:
                quiet = self._quiet.get(pulse.job_id)
                if quiet is None or (quiet.token, quiet.beat) != (pulse.token, pulse.beat):
                    quiet = _Quiet(pulse.token, pulse.beat)
                else:
                    quiet.seconds += min(passed, pulse.lease_seconds / LOOKS)
                seen[pulse.job_id] = quiet
                if quiet.seconds >= pulse.lease_seconds or is_dead(self._workers, pulse.worker):
                    dead.append(pulse)
            self._quiet = seen
            return dead


class WorkerLock:
    """A lock on `<worker>.lock`, which the system releases however the worker's process ends."""

    def __init__(self, folder: Path, supervisor: str = "") -> None:
        """Make a new worker name and lock it. `supervisor`: the id of the SupervisorLock of the worker's parent."""
        self.worker = ".".join(filter(None, [_host(), str(os.getpid()), secrets.token_hex(4), supervisor]))
        self._path = folder / f"{self.worker}.lock"
        self._lock = FileLock(self._path, thread_local=False)
        self._lock.acquire(timeout=10)  # a watcher may be testing the new file
        remove_stale_locks(folder)

    def release(self) -> None:
        """Release the lock; the worker's leases are dead from now on."""
        # Only the lock, not the file: a free lock shows watchers at once that the leases are dead.
        self._lock.release()


class SupervisorLock:
    """A lock that shows that a worker's supervisor is alive.

    If a worker dies and its supervisor lives, its job may have caused the crash. If both died, the cause was probably a
    kill of the service or of the machine.
    """

    def __init__(self, folder: Path) -> None:
        """Make a new id; nothing is locked yet."""
        self.id = secrets.token_hex(4)
        self._folder = folder
        self._lock = FileLock(_supervisor_path(folder, self.id), thread_local=False)

    def acquire(self) -> None:
        """Lock, until the end of this process or `release`."""
        self._lock.acquire(timeout=10)

    def release(self) -> None:
        """Release the lock and remove its file and the heartbeat file."""
        if self._lock.is_locked:
            with suppress(OSError):
                Path(self._lock.lock_file).unlink(missing_ok=True)
            with suppress(OSError):
                beat_path(self._folder, self.id).unlink(missing_ok=True)
            self._lock.release()


def outlived_by_supervisor(folder: Path, worker: str) -> bool:
    """Return whether a dead worker's supervisor is alive. True if that cannot be determined."""
    host, *rest = worker.split(".")
    if len(rest) != 3 or host != _host() or "/" in worker or "\\" in worker:
        return True
    path = _supervisor_path(folder, rest[2])
    return path.exists() and not is_unlocked(path)


def is_dead(folder: Path, worker: str) -> bool:
    """Return whether a worker of this machine and this data folder has ended. False if that cannot be determined."""
    if worker.split(".")[0] != _host() or "/" in worker or "\\" in worker:
        return False
    return is_unlocked(folder / f"{worker}.lock")


def live_workers(folder: Path) -> list[str]:
    """Return the names of this data folder's workers that run on this machine."""
    return [path.name.removesuffix(".lock") for path in folder.glob(f"{_host()}.*.lock") if not is_unlocked(path)]


def beat_path(folder: Path, supervisor: str) -> Path:
    """Return the heartbeat file: a supervisor's worker touches it while it makes progress."""
    return folder / f"{_host()}.{supervisor}.beat"


def read_beat(path: Path) -> str | None:
    """Return what the worker of a heartbeat file waits for; None if it does not wait, or the file cannot be read."""
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return (lines[0] or None) if lines else None


class BeatWatch:
    """How long a heartbeat file has not been touched. Each pair of watcher and watched process needs its own.

    Each look adds at most `longest` seconds, so that pauses of the watcher or of the machine count for little.
    """

    def __init__(self, path: Path, longest: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._longest = longest
        self._monotonic = monotonic
        self._looked = monotonic()
        self._seen: int | None = None
        self._quiet = 0.0

    def quiet(self) -> float:
        """Look at the file; return for how many seconds of the watcher's running time it was unchanged."""
        now = self._monotonic()
        try:
            seen = self._path.stat().st_mtime_ns
        except OSError:
            seen = None
        if seen != self._seen:
            self._seen, self._quiet = seen, 0.0
        else:
            self._quiet += min(max(0.0, now - self._looked), self._longest)
        self._looked = now
        return self._quiet


def remove_stale_locks(folder: Path) -> None:
    """Remove files of workers and supervisors that ended long ago, whose jobs have been recovered since."""
    for path in (*folder.glob(f"{_host()}.*.lock"), *folder.glob(f"{_host()}.*.supervisor")):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > SWEEP_SECONDS and is_unlocked(path):
                path.unlink()
    for path in (*folder.glob(f"{_host()}.*.memory"), *folder.glob(f"{_host()}.*.beat")):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > SWEEP_SECONDS:  # a living worker writes it often
                path.unlink()


def _supervisor_path(folder: Path, supervisor: str) -> Path:
    return folder / f"{_host()}.{supervisor}.supervisor"


def _host() -> str:
    return socket.gethostname().replace(".", "-").replace("/", "-") or "host"
