"""The one load of the transformer, in threads beside the encoding of a text; shared by all who wait for it."""

from collections.abc import Callable
from concurrent.futures import CancelledError as NotBegun
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Event, Lock

from torch import Tensor, nn

from wanduet.errors import CancelledError
from wanduet.runtime.context import RunContext
from wanduet.runtime.loaded import LoadedTransformer
from wanduet.runtime.release import forget_traceback, release_models

Start = Callable[[ThreadPoolExecutor], Future[LoadedTransformer]]
"""Starts a load in a pool of two threads."""

# How often who waits for a load looks whether its job was cancelled, in seconds.
POLL = 0.1


class Loading:
    """The transformer, and at most one load of it at a time, shared by all who wait. Methods are for any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._load: Future[LoadedTransformer] | None = None
        self._begun_for = ""  # the job
        self._pool: ThreadPoolExecutor | None = None
        self.loaded: LoadedTransformer | None = None
        self.stopped = Event()  # whoever loads looks at it now and then

    def begin(self, start: Start, job: str) -> None:
        """Start to load for a job, by its id, unless the transformer is there or on its way."""
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
        """The transformer: the one that is there, or what the load under way, or a new one, comes to.

        A job that is cancelled meanwhile stops to wait, and leaves the load to the next. Raises CancelledError, or what
        the load raises.
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
                self._load = None  # also where it has failed: the next job tries again
                if not _failed(load):
                    self.loaded = load.result()
        try:
            return load.result()
        except NotBegun:
            raise CancelledError("The engine is closed.") from None

    def drop(self) -> None:
        """Give back the transformer's memory; nobody may use it."""
        if self.loaded is not None:
            self._free()
            release_models()

    def _free(self) -> None:
        if self.loaded is not None:
            try:
                self.loaded.free()
            finally:
                with self._lock:  # only now: a load that begins at once finds room
                    self.loaded = None

    def stop(self) -> None:
        """Let a load under way end as soon as it can, and begin none."""
        self.stopped.set()

    def close(self) -> None:
        """Stop, wait until nothing loads any more, and free what was loaded. Loads can begin again then."""
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


class Targets(dict[str, Tensor]):
    """The tensors that a load fills, one after another; it stops when `check` raises."""

    def __init__(self, parameters: dict[str, nn.Parameter], check: Callable[[], None]) -> None:
        super().__init__((name, parameter.data) for name, parameter in parameters.items())
        self._check = check

    def __getitem__(self, name: str) -> Tensor:
        self._check()
        return super().__getitem__(name)
