"""Ends its own process when it hangs: a driver call that does not return, a loop that makes no progress.

The supervisor then starts another process, and the jobs continue from their checkpoints. A process that cannot even run
this thread (it was stopped, or a call never releases the GIL) no longer touches its heartbeat file, which its supervisor
watches (`jobs.leases.BeatWatch`). That file also says what the process waits for, if it lacks something that it needs,
such as the database.

Each check adds a bounded time, so that a pause of the whole machine does not count as a hang.
"""

import math
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import structlog

if TYPE_CHECKING:
    from wanduet.runtime.context import Event

log = structlog.get_logger(__name__)

FOREVER = math.inf  # seconds
HUNG_STATUS = 75  # exit status of a process that the watchdog ended: BSD's EX_TEMPFAIL
_GIVE_BACK_SECONDS = 5.0
_FRAMES = 12  # of each thread that are logged


@dataclass(frozen=True, slots=True)
class HangSettings:
    """How many seconds a worker may make no progress before it counts as hung and is ended.

    The supervisor checks two limits: `stopped_seconds`, how long a signal may stop the process, and `beat_seconds`
    between two touches of the heartbeat file. The watchdog checks the others: `start_seconds` until the first iteration of
    the worker's loop, `loop_seconds` between two iterations, `step_seconds` between two denoising steps, `phase_seconds`
    between any other two events of a job (loading and hashing weights, encoding text on a CPU, compiling kernels). If a
    job's steps are predicted or measured to be long, it gets `factor` times their duration if that is more. A job that is
    cancelled must leave the engine within `cancel_seconds`, so that others get it.
    `look_seconds`: between two checks of the watchdog.
    """

    stopped_seconds: float = 10.0
    beat_seconds: float = 300.0
    loop_seconds: float = 900.0
    start_seconds: float = 3600.0
    step_seconds: float = 600.0
    phase_seconds: float = 1800.0
    factor: float = 5.0
    cancel_seconds: float = 10.0
    look_seconds: float = 1.0


class Activity:
    """Something that must make progress within a time that it sets itself. Thread-safe."""

    def __init__(self, clock: Callable[[], float], settings: HangSettings, allowed: float) -> None:
        self.settings = settings
        self._clock = clock
        self._state = (clock(), allowed)  # one assignment: always read together
        self._leaves_by: float | None = None  # when a cancelled job must have left the engine
        self.waits_for: str | None = None  # why it makes no progress; None if it does

    def expect(self, seconds: float, waits_for: str | None = None) -> None:
        """Record progress; the next report is due within `seconds` (inf: no deadline).

        `waits_for`: why there is no progress until then.
        """
        self.waits_for = waits_for
        self._state = (self._clock(), seconds)

    def leave(self) -> None:
        """Record that the job was cancelled: it must leave the engine within `cancel_seconds`."""
        if self._leaves_by is None:
            self._leaves_by = self._clock() + self.settings.cancel_seconds

    def left(self) -> None:
        """Record that the job has left the engine, whether it was cancelled before or is later."""
        self._leaves_by = math.inf

    @property
    def lingers(self) -> bool:
        """Whether the job was cancelled and has not left the engine in time."""
        return self._leaves_by is not None and self._clock() > self._leaves_by

    @property
    def overdue(self) -> float:
        """Seconds since the next report was due; negative before that."""
        since, allowed = self._state
        return self._clock() - since - allowed


class Watchdog:
    """Watches a process's loop and its jobs. It touches the heartbeat file `beat`, and writes into it what the process
    waits for. It does nothing before `start`.

    The process hangs if its loop makes no progress, or if none of its jobs does: one of several may wait for another's
    stage. It hangs, too, if a cancelled job does not leave the engine; `give_back` is called then, which should put the
    other jobs back into the queue. `end` ends the process and does not return.
    """

    def __init__(
        self,
        settings: HangSettings | None = None,
        beat: Path | None = None,
        *,
        end: "Callable[[], object] | None" = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings or HangSettings()
        self._beat = beat
        self._file: BinaryIO | None = None  # kept open: a process without free file descriptors can still write into it
        self._written: str | None = None
        self._end = end or end_process
        self.give_back: Callable[[], object] = lambda: None
        self._monotonic = monotonic
        self._looked = monotonic()
        self._now = 0.0
        self._loop = Activity(lambda: self._now, self.settings, self.settings.start_seconds)
        self._jobs: dict[str, Activity] = {}
        self._guard = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start the thread that calls `look` every `look_seconds`, until `stop`."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread."""
        self._stopping.set()

    def iterated(self, waits_for: str | None = None) -> None:
        """Record an iteration of the process's loop. `waits_for`: why it takes no jobs now."""
        self._loop.expect(self.settings.loop_seconds, waits_for)

    @property
    def waits_for(self) -> str | None:
        """Why the process makes no progress: its loop waits, or each of its jobs does. None if it makes progress."""
        with self._guard:
            jobs = [activity.waits_for for activity in self._jobs.values()]
        return self._loop.waits_for or (jobs[0] if all(jobs) and jobs else None)

    def add(self, job_id: str) -> Activity:
        """Start watching a job."""
        activity = Activity(lambda: self._now, self.settings, self.settings.phase_seconds)
        with self._guard:
            self._jobs[job_id] = activity
        return activity

    def remove(self, job_id: str) -> None:
        """Stop watching a job."""
        with self._guard:
            self._jobs.pop(job_id, None)

    def look(self) -> str | None:
        """Check once; return what hangs, None if nothing does."""
        now = self._monotonic()
        self._now += min(max(0.0, now - self._looked), 2 * self.settings.look_seconds)
        self._looked = now
        if self._beat is not None:
            with suppress(OSError):
                self._beat.touch()
            with suppress(OSError):
                self._write_reason(self.waits_for)
        if self._loop.overdue > 0:
            return "the worker's loop stands still"
        with self._guard:
            jobs = dict(self._jobs)
        if lingering := [job_id for job_id, activity in jobs.items() if activity.lingers]:
            return f"{', '.join(lingering)} was cancelled and does not leave the engine"
        if jobs and all(activity.overdue > 0 for activity in jobs.values()):
            return f"no sign of progress from {', '.join(jobs)}"
        return None

    def _write_reason(self, waits_for: str | None) -> None:
        """Write what the process waits for into the first line of the heartbeat file. Raises OSError."""
        if self._file is not None and waits_for != self._written:
            self._file.seek(0)
            self._file.write(f"{' '.join((waits_for or '').split())}\n".encode())
            self._file.truncate()
            self._written = waits_for

    def _run(self) -> None:
        with ExitStack() as files:
            if self._beat is not None:
                with suppress(OSError):
                    self._file = files.enter_context(self._beat.open("wb", buffering=0))
            while not self._stopping.wait(self.settings.look_seconds):
                if (what := self.look()) is not None:
                    log.error("the worker hangs and is ended", what=what, threads=_where_threads_are())
                    self._give_back()
                    self._end()
                    return

    def _give_back(self) -> None:
        """If a cancelled job is why the process ends, that is no crash of its other jobs."""
        with self._guard:
            lingering = any(activity.lingers for activity in self._jobs.values())
        if lingering:
            giving = threading.Thread(target=self.give_back, daemon=True)
            with suppress(RuntimeError):  # no more threads
                giving.start()
                giving.join(_GIVE_BACK_SECONDS)  # the database may hang, too


class Patience:
    """How long a job's next event may take, from its plan's prediction and its steps so far.

    `predicted`: seconds of one denoising step (`denoise`) and of the whole decode (`decode`), if known.
    """

    def __init__(
        self, settings: HangSettings, predicted: Mapping[str, float], monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._step = predicted.get("denoise", 0.0)
        self._decode = predicted.get("decode", 0.0)
        self._monotonic = monotonic
        self._last: tuple[int, int, float] | None = None  # video, steps done, when

    def after(self, event: "Event") -> float:
        """Return the seconds that the event after `event` may take."""
        settings, now = self._settings, self._monotonic()
        if event.phase != "denoise":
            self._last = None
            return max(settings.phase_seconds, settings.factor * self._decode)
        made_step = self._last is not None and self._last[:2] == (event.video, event.done - 1)
        if made_step and self._last is not None:
            self._step = max(self._step, now - self._last[2])
        self._last = (event.video, event.done, now)
        step = settings.factor * self._step
        if made_step and event.done < event.total:
            return max(settings.step_seconds, step)
        # The first step includes compiling kernels and moving weights; the last is followed by the decode or a wait.
        return max(settings.phase_seconds, step, settings.factor * self._decode)


def end_process() -> None:
    """Kill this process and its children."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(HUNG_STATUS)


def _where_threads_are() -> dict[str, list[str]]:
    """Return each thread's stack, innermost frame last; locations only, as variables may contain prompts."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        names.get(ident, str(ident)): [
            f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_stack(top)[-_FRAMES:]
        ]
        for ident, top in sys._current_frames().items()
    }
