"""The load of the transformer in background threads. There is one at a time; all waiting jobs share it."""

from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError as NotBegun
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Event, Lock

from wanduet.errors import CancelledError
from wanduet.runtime.context import RunContext
from wanduet.runtime.loaded import LoadedTransformer
from wanduet.runtime.release import forget_traceback, release_models
from wanduet.weights.source import Target

Start = Callable[[ThreadPoolExecutor], Future[LoadedTransformer]]
"""Starts a load in a pool of two threads."""

# Seconds between checks for a cancel while a job waits for a load.
POLL = 0.1


class Loading:
    """The transformer and at most one load of it at a time, shared by all waiting jobs. Methods may be called from any
    thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._load: Future[LoadedTransformer] | None = None
        self._begun_for = ""  # the id of the job that started `_load`
        self._pool: ThreadPoolExecutor | None = None
        self.loaded: LoadedTransformer | None = None
        self.stopped = Event()  # a load polls it

    def begin(self, start: Start, job: str) -> None:
        """Start a load for the job with this id, unless the transformer is loaded or a load is running."""
        with self._lock:
            if self.loaded is None:
                self._begin(start, job)

    def _begin(self, start: Start, job: str) -> Future[LoadedTransformer]:
        if self.stopped.is_set():
            raise CancelledError("The engine is closed.")
        load = self._load
        if load is None or (_failed(load) and self._begun_for != job):  # a failure is raised once, then tried again
            if self._pool is None:
                self._pool = ThreadPoolExecutor(2, "wanduet-load")
            self._load = load = start(self._pool)
            self._begun_for = job
        return load

    def wait(self, start: Start, context: RunContext) -> LoadedTransformer:
        """Return the transformer: the loaded one, or the result of the running load, or of a new one.

        If the job is cancelled meanwhile, the load goes on for the next job. Raises CancelledError, or the load's
        error.
        """
        with self._lock:
            if self.loaded is not None:
                return self.loaded
            load = self._begin(start, context.id)
        while not load.done():
            context.check_cancelled()
            wait((load,), POLL)
        with self._lock:
            if self._load is load:
                self._load = None  # also after a failure: the next job tries again
                if not _failed(load):
                    self.loaded = load.result()
        try:
            return load.result()
        except NotBegun:
            raise CancelledError("The engine is closed.") from None

    def settle(self, context: RunContext) -> None:
        """Wait until no load is running. A failure is left for the next `wait` to raise. Raises CancelledError."""
        with self._lock:
            load = self._load
        while load is not None and not load.done():
            context.check_cancelled()
            wait((load,), POLL)
        with self._lock:
            if load is not None and self._load is load and not _failed(load):
                self._load, self.loaded = None, load.result()

    def drop(self) -> None:
        """Free the transformer's memory. No thread may use it."""
        if self.loaded is not None:
            self._free()
            release_models()

    def _free(self) -> None:
        if self.loaded is not None:
            try:
                self.loaded.free()
            finally:
                with self._lock:  # after `free`, so that the next load has its memory
                    self.loaded = None

    def stop(self) -> None:
        """Stop a running load as soon as possible, and start no other."""
        self.stopped.set()

    def close(self) -> None:
        """Stop, wait until the load has ended, and free the transformer. Afterwards, loads may start again."""
        with self._lock:
            self.stopped.set()
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            load, self._load = self._load, None
            self.stopped.clear()
        if load is not None and not _failed(load):
            load.result().free()
        elif load is not None and not load.cancelled() and (error := load.exception()) is not None:
            forget_traceback(error)
        self._free()


def _failed(load: Future[LoadedTransformer]) -> bool:
    return load.done() and (load.cancelled() or load.exception() is not None)


class Targets(dict[str, Target]):
    """What a load fills, by name. Each lookup calls `check`, which raises to stop the load."""

    def __init__(self, targets: Mapping[str, Target], check: Callable[[], None]) -> None:
        super().__init__(targets)
        self._check = check

    def __getitem__(self, name: str) -> Target:
        self._check()
        return super().__getitem__(name)
