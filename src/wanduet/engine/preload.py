"""A transformer and the one load of it, and what else a first job needs, in threads beside the encoding of its text.

Whatever fails here but the loading is done once more, and fails, where it is needed.
"""

import logging
from collections.abc import Callable
from concurrent.futures import CancelledError as NotBegun
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from threading import Event, Lock
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wanduet.engine.job import Planned
from wanduet.errors import CancelledError
from wanduet.kernels.attention.backends import import_backends
from wanduet.kernels.device import on_device_of
from wanduet.kernels.select import vae_kernels_for, vae_kernels_to_compile
from wanduet.models.vae.arena_size import compile_decode
from wanduet.runtime.gil import SHORT_TURNS
from wanduet.runtime.release import forget_traceback, release_models
from wanduet.sampling.samplers import make_sampler

if TYPE_CHECKING:
    from wanduet.engine.build import Models
    from wanduet.runtime.denoiser import Denoiser

log = logging.getLogger(__name__)

# How often who waits for a load looks whether its job was cancelled, in seconds.
POLL = 0.1


class Loading:
    """The transformer, and at most one load of it at a time, shared by all who wait. Methods are for any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._load: Future[Denoiser] | None = None
        self._begun_for = ""  # the job
        self._pool: ThreadPoolExecutor | None = None
        self.loaded: Denoiser | None = None
        self.stopped = Event()  # whoever loads looks at it now and then

    def begin(self, models: "Models", work: Planned) -> None:
        """Load the transformer as a job's plan wants it, unless it is there or on its way."""
        with self._lock:
            if self.loaded is None:
                self._begin(models, work)

    def _begin(self, models: "Models", work: Planned) -> "Future[Denoiser]":
        if self.stopped.is_set():
            raise CancelledError("The engine is closed.")
        load = self._load
        if load is None or (_failed(load) and self._begun_for != work.id):  # a failure is raised once, then tried again
            if self._pool is None:
                self._pool = ThreadPoolExecutor(2, "wanduet-load")
            self._load = load = preload(models, work, self._pool)
            self._begun_for = work.id
        return load

    def wait(self, models: "Models", work: Planned) -> "Denoiser":
        """The transformer: the one that is there, or what the load under way, or a new one, comes to.

        A job that is cancelled meanwhile stops to wait, and leaves the load to the next. Raises CancelledError, or what
        the load raises.
        """
        with self._lock:
            if self.loaded is not None:
                return self.loaded
            load = self._begin(models, work)
        while not load.done():
            work.check_cancelled()
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


def _failed(load: "Future[Denoiser]") -> bool:
    return load.done() and (load.cancelled() or load.exception() is not None)


class Targets(dict[str, Tensor]):
    """The tensors that a load fills, one after another; it stops when `check` raises."""

    def __init__(self, parameters: dict[str, nn.Parameter], check: Callable[[], None]) -> None:
        super().__init__((name, parameter.data) for name, parameter in parameters.items())
        self._check = check

    def __getitem__(self, name: str) -> Tensor:
        self._check()
        return super().__getitem__(name)


def preload(models: "Models", work: Planned, pool: ThreadPoolExecutor) -> "Future[Denoiser]":
    """Start; comes to the transformer, set up for the job. `pool` has two threads.

    Imports come after the loading: most of what they do keeps the interpreter to itself.
    """
    loaded = pool.submit(models.load_denoiser, work)
    fitted = pool.submit(_fit, models, work, loaded)
    # Not the futures: they hold the transformer, and the rest may take half a minute.
    is_loaded, is_fitted = Event(), Event()
    loaded.add_done_callback(lambda _: is_loaded.set())
    fitted.add_done_callback(lambda _: is_fitted.set())
    rest = pool.submit(_prepare_rest, models, work, is_loaded, is_fitted)
    SHORT_TURNS.begin()
    rest.add_done_callback(lambda _: SHORT_TURNS.end())  # also if the engine is closed before it begins
    return fitted


def _fit(models: "Models", work: Planned, loaded: "Future[Denoiser]") -> "Denoiser":
    denoiser = loaded.result()
    import_backends(denoiser.device, models.config.attention, models.config.data_folder / "kernels")
    with on_device_of(denoiser.device), suppress(Exception):
        models.fit_to(denoiser, work)
    return denoiser


def _prepare_rest(models: "Models", work: Planned, is_loaded: Event, is_fitted: Event) -> None:
    """What the first step and the decode need beside the transformer."""
    try:
        is_loaded.wait()
        with suppress(Exception):
            make_sampler(work.request.sampler, work.request.flow_shift, 1, torch.device("cpu"))
        is_fitted.wait()  # which measures what attention takes
        if not work.cancelled:
            _prepare_vae_kernels(models, work)
    except Exception as error:
        log.info("The decode's kernels could not be made ready beforehand: %s", error)


def _prepare_vae_kernels(models: "Models", work: Planned) -> None:
    """The decode's kernels, while the denoise runs: at the first job on a machine they take half a minute."""
    plan, request = work.plan, work.request
    device, dtype = torch.device(plan.vae.device), getattr(torch, plan.vae.dtype)
    kernels = vae_kernels_to_compile(device, plan.vae.tf32)
    if kernels is None:
        return
    models.choose_tiles(device, dtype, may_measure=False)  # the denoise runs
    size = (request.generated_height, request.generated_width)
    compile_decode(models.spec.vae, *size, plan.vae.tiling, dtype, kernels)
    if plan.both_resident:  # else what they are tried on may have no room beside the transformer
        with on_device_of(device):
            vae_kernels_for(device, dtype, models.spec.vae.base_dim, plan.vae.tf32)
