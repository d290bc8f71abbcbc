"""Who still lives: leases watched over the watcher's own time, and locks that the system drops at death.

No clock is compared with another. A watcher counts how long it has itself looked at a beat that did not
move; a jump of the wall clock, and a pause of the whole machine or of the watcher, count for nothing.
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

from filelock import FileLock, Timeout

from wanduet.jobs.records import Pulse

# A beat must have stood still in at least this many looks: one long gap between two looks proves nothing,
# because the watcher may have been paused together with the worker.
LOOKS = 4
SWEEP_SECONDS = 3600.0


@dataclass(slots=True)
class _Quiet:
    token: int
    beat: int
    seconds: float = 0.0


class LeaseWatch:
    """Finds leases whose holders are dead. One for each watcher; `monotonic` gives seconds that never go back."""

    def __init__(self, workers: Path, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._workers = workers
        self._monotonic = monotonic
        self._looked: float | None = None
        self._quiet: dict[str, _Quiet] = {}
        self._guard = threading.Lock()

    def look(self, pulses: Iterable[Pulse]) -> list[Pulse]:
        """The leases that are dead as of this look. Call it a few times in each lease's length.

        A lease is dead when its beat stood still for its length, or at once when its worker ran on this
        machine and the system has released the worker's lock.
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
    """Proof of life on this machine: a lock on `<worker>.lock`, which the system releases however a process ends."""

    def __init__(self, folder: Path, supervisor: str = "") -> None:
        """Take a new name and lock it. `supervisor`: the id of the SupervisorLock of whoever started this worker."""
        self.worker = ".".join(filter(None, [_host(), str(os.getpid()), secrets.token_hex(4), supervisor]))
        self._path = folder / f"{self.worker}.lock"
        self._lock = FileLock(self._path, thread_local=False)
        self._lock.acquire(timeout=10)  # a watcher may be trying the new file just now
        remove_stale_locks(folder)

    def release(self) -> None:
        """Give the name up; its leases are dead from now on."""
        # The lock first: a watcher then finds the lease dead at once and not after its whole length.
        self._lock.release()


class SupervisorLock:
    """Proof that whoever starts a worker again lives: a worker that dies alone is tried for it, one that dies
    together with its supervisor was taken along, by a kill of the service or by the machine.
    """

    def __init__(self, folder: Path) -> None:
        """Take a new id; nothing is locked yet."""
        self.id = secrets.token_hex(4)
        self._folder = folder
        self._lock = FileLock(_supervisor_path(folder, self.id), thread_local=False)

    def acquire(self) -> None:
        """From now on, until the end of this process or `release`."""
        self._lock.acquire(timeout=10)

    def release(self) -> None:
        """Leave nothing behind."""
        if self._lock.is_locked:
            with suppress(OSError):
                Path(self._lock.lock_file).unlink(missing_ok=True)
            with suppress(OSError):
                beat_path(self._folder, self.id).unlink(missing_ok=True)
            self._lock.release()


def outlived_by_supervisor(folder: Path, worker: str) -> bool:
    """Whether a dead worker's supervisor lives. True where that cannot be known."""
    host, *rest = worker.split(".")
    if len(rest) != 3 or host != _host() or "/" in worker or "\\" in worker:
        return True
    path = _supervisor_path(folder, rest[2])
    return path.exists() and not _is_free(path)


def is_dead(folder: Path, worker: str) -> bool:
    """Whether a worker of this machine and this data folder has ended. False where that cannot be known."""
    if worker.split(".")[0] != _host() or "/" in worker or "\\" in worker:
        return False
    return _is_free(folder / f"{worker}.lock")


def live_workers(folder: Path) -> list[str]:
    """The names of the workers of this data folder that run on this machine."""
    return [path.name.removesuffix(".lock") for path in folder.glob(f"{_host()}.*.lock") if not _is_free(path)]


def beat_path(folder: Path, supervisor: str) -> Path:
    """The file that a supervisor's worker touches while it is well."""
    return folder / f"{_host()}.{supervisor}.beat"


def read_beat(path: Path) -> str | None:
    """What the worker that touches a beat file waits for; None if it does not wait, or nobody can read it."""
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return (lines[0] or None) if lines else None


class BeatWatch:
    """How long a beat file has not been touched. One for each watcher and each process watched.

    Each look adds at most `longest` seconds, so that a pause of the watcher, or of the whole machine, counts for little.
    """

    def __init__(self, path: Path, longest: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._longest = longest
        self._monotonic = monotonic
        self._looked = monotonic()
        self._seen: int | None = None
        self._quiet = 0.0

    def quiet(self) -> float:
        """Look; the seconds that it has stood still, of those that the watcher was awake."""
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
    """Remove what workers and supervisors left that ended long ago, whose jobs were recovered since."""
    for path in (*folder.glob(f"{_host()}.*.lock"), *folder.glob(f"{_host()}.*.supervisor")):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > SWEEP_SECONDS and _is_free(path):
                path.unlink()
    for path in (*folder.glob(f"{_host()}.*.memory"), *folder.glob(f"{_host()}.*.beat")):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > SWEEP_SECONDS:  # a living worker writes it all the time
                path.unlink()


def _supervisor_path(folder: Path, supervisor: str) -> Path:
    return folder / f"{_host()}.{supervisor}.supervisor"


def _is_free(path: Path) -> bool:
    if not path.exists():
        return False
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return False
    lock.release()
    return True


def _host() -> str:
    return socket.gethostname().replace(".", "-").replace("/", "-") or "host"
