"""Supervises a worker's process: restarts it when it dies, and kills it when it hangs.

The supervising thread survives all errors; `trouble` says why no worker takes jobs meanwhile.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

import structlog

from wanduet.jobs.child import child_environment, module_command
from wanduet.jobs.files import JobFiles
from wanduet.jobs.leases import BeatWatch, SupervisorLock, beat_path, live_workers, read_beat
from wanduet.jobs.logs import describe_error
from wanduet.jobs.watchdog import HUNG_STATUS
from wanduet.jobs.worker import URL_VARIABLE, WorkerSettings

log = structlog.get_logger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 30.0  # seconds before a crashed worker is started again
_HEALTHY_SECONDS = 60.0  # after running for so long, the pause before a restart is the first again
_END_SECONDS = 10.0  # a killed process that takes longer to end is logged

# glibc gives threads malloc arenas of their own, up to eight a core. Memory freed in one is not reused by another, and
# each job starts new threads, so the memory of a worker that runs for weeks would grow.
MEMORY_POOLS = {"MALLOC_ARENA_MAX": "1"}


class WorkerProcess:
    """Keeps one worker process running: restarts it when it dies or hangs, drains it on `stop`.

    `pauses`: seconds before the first restart, which each further crash doubles, and their maximum.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        url: str | None = None,
        environment: Mapping[str, str] | None = None,
        pauses: tuple[float, float] = (_FIRST_PAUSE, _LONGEST_PAUSE),
    ) -> None:
        self._files = JobFiles(settings.config.data_folder)
        self._workers = self._files.workers
        self._reserve = settings.runner.attempt.reserve_bytes
        self._lock = SupervisorLock(self._workers)
        settings = replace(settings, runner=replace(settings.runner, supervisor=self._lock.id))
        self._hangs = settings.runner.hangs
        self._arguments = module_command(*self._command(settings))
        given = {**MEMORY_POOLS, **os.environ, **(environment or {})} | ({URL_VARIABLE: url} if url else {})
        self._environment = child_environment(given)
        self._pauses = pauses
        self._stopping = threading.Event()
        self._killed = False  # not an Event: a signal handler must not take its lock
        self._guard = threading.RLock()  # reentrant: a signal handler may call `kill` in a thread that has it
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._watch, name="worker-watch", daemon=True)
        self._reason: str | None = None  # why there is no worker, if known
        self._hanging: str | None = None  # why the current process counts as hanging
        self.restarts = 0
        self.hangs = 0

    def _command(self, settings: WorkerSettings) -> list[str]:
        """Return the module that the process runs, followed by its arguments."""
        return ["wanduet.jobs.worker", settings.to_json()]

    @property
    def pid(self) -> int | None:
        """The id of the running process; None if there is none."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    @property
    def trouble(self) -> str | None:
        """Why no worker of this machine takes jobs at the moment, for people; None if one does."""
        if self._files.free_bytes() < self._reserve:
            return (
                f"the data folder's disk is full: no job is begun before {self._reserve / 2**20:.0f} MiB of it are free"
            )
        mine = f".{self._lock.id}"
        live = live_workers(self._workers)
        if any(not name.endswith(mine) for name in live):  # a worker of another server with the same data folder
            return None
        return self._own_trouble(any(name.endswith(mine) for name in live))

    def _own_trouble(self, live: bool) -> str | None:
        if not self._thread.is_alive():
            return "nothing looks after the worker: restart the server"
        if self._hanging is not None:
            return self._hanging
        if live:
            return read_beat(beat_path(self._workers, self._lock.id))
        return self._reason or "the worker is starting"

    def _is_ending(self) -> bool:
        return self._killed or self._stopping.is_set()

    def start(self) -> None:
        """Start the process and supervise it."""
        self._lock.acquire()
        self._thread.start()

    def stop(self, timeout: float = 30.0) -> int | None:
        """Drain the worker, kill it after `timeout` seconds; return its exit status, None if no process ran."""
        self._stopping.set()
        with self._guard:  # no process is started from here on
            process = self._process
        if process is not None:
            with suppress(OSError):
                _signal_drain(process)
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                log.error("the worker did not end and is killed", seconds=timeout)
                _kill(process)
        if self._thread.ident is not None:
            self._thread.join(timeout + _END_SECONDS)
        self._lock.release()
        return None if process is None else process.returncode

    def kill(self) -> None:
        """Kill the worker; its jobs wait in the queue for the next one."""
        self._killed = True
        with self._guard:
            process = self._process
        if process is not None:
            _kill(process)

    def _watch(self) -> None:
        first, longest = self._pauses
        pause = first
        while not self._is_ending():
            started = time.monotonic()
            try:
                what = self._run_once()
            except Exception as error:  # out of memory, threads or descriptors, which may be temporary
                what = f"the worker cannot be kept running: {getattr(error, 'strerror', None) or type(error).__name__}"
                log.error("the worker cannot be kept running", pause=pause, **describe_error(error))
            if self._is_ending():
                return
            healthy = time.monotonic() - started > _HEALTHY_SECONDS
            pause = first if healthy else min(pause * 2, longest)
            self._reason = f"{what}; the next try comes within {pause:.0f} s"
            self._hanging = None  # only now: one of the two always says why no worker takes jobs
            self._stopping.wait(pause)
            self._reason = f"{what}; another is starting"

    def _run_once(self) -> str:
        """Start the process and watch it until it ends; return how it ended."""
        with self._guard:
            if self._is_ending():
                return "the server stops"
            # Nothing is written to the pipe: its end shows the worker that this process has ended.
            # A session of its own: Ctrl-C in a terminal is for this process, which then drains the worker.
            process = subprocess.Popen(
                self._arguments,
                stdin=subprocess.PIPE,
                env=self._environment,
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
            )
            self._process = process
        try:
            hung = self._hangs_before_it_ends(process)
        finally:
            _kill(process)  # also its children, such as ranks on GPUs; and the process itself if watching failed
            if process.stdin is not None:
                process.stdin.close()
            status = process.wait()
        if self._is_ending():
            return "the server stops"
        self.restarts += 1
        if status == HUNG_STATUS:  # its own watchdog ended it
            hung = True
            self.hangs += 1
        what = "hung and was ended" if hung else f"died ({_how(status)})"
        log.error(f"the worker {what}; it is started again", status=status)
        return f"the worker {what}"

    def _hangs_before_it_ends(self, process: "subprocess.Popen[bytes]") -> bool:
        """Wait for the process to end; kill it and return True if it hangs."""
        look = self._hangs.look_seconds
        beats = BeatWatch(beat_path(self._workers, self._lock.id), 2 * look)
        stopped, looked = 0.0, time.monotonic()
        while True:
            try:
                process.wait(look)
                return False
            except subprocess.TimeoutExpired:
                pass
            now = time.monotonic()
            stopped = stopped + min(now - looked, 2 * look) if _is_stopped(process) else 0.0
            looked = now
            quiet = beats.quiet()
            if stopped < self._hangs.stopped_seconds and quiet < self._hangs.beat_seconds:
                continue
            seconds = stopped if stopped >= self._hangs.stopped_seconds else quiet
            self._hanging = f"the worker stands still for {seconds:.0f} s and is being ended"
            self.hangs += 1
            log.error("the worker hangs and is ended", stopped=stopped > 0, seconds=round(seconds, 1))
            _kill(process)
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._hanging = "the worker hangs in the system's kernel and cannot be ended: restart the machine"
                log.error("the worker cannot be ended")
                process.wait()
            return True


def _is_stopped(process: "subprocess.Popen[bytes]") -> bool:
    """Return whether a child is stopped by a signal such as SIGSTOP. False if that cannot be determined."""
    if sys.platform != "linux":
        return False
    try:
        found = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
    except OSError:  # it ended and was reaped already
        return False
    return found is not None


def _how(status: int) -> str:
    return f"exit status {status}" if status >= 0 else f"signal {-status}"


def _signal_drain(process: "subprocess.Popen[bytes]") -> None:
    if sys.platform != "win32":
        process.terminate()
    elif process.stdin is not None:  # Windows: `terminate` would kill it, but it drains at the end of its input
        process.stdin.close()


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and the processes of its group."""
    if sys.platform != "win32":
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    with suppress(OSError):
        process.kill()
