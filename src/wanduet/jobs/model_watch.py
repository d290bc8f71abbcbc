"""Fails jobs that wait for a model which no worker has, so that they do not stay in the queue for ever.

Which models workers have is inferred: a model is available if one of its jobs runs, or if its oldest job changes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from wanduet.jobs.records import MODEL_CHANGED, JobError, ModelId
from wanduet.jobs.store import JobStore

log = structlog.get_logger(__name__)

LOOK_SECONDS = 1.0  # between two looks; also the most that a look adds to a wait, as a paused watcher saw nothing


@dataclass(slots=True)
class _Wait:
    oldest: str
    seconds: float = 0.0


class ModelWatch:
    """Fails jobs that waited `patience` seconds, as seen here, for a model that no worker has. Not thread-safe."""

    def __init__(self, store: JobStore, patience: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._patience = patience
        self._monotonic = monotonic
        self._looked: float | None = None
        self._waits: dict[ModelId, _Wait] = {}

    def look(self, model: ModelId) -> int:
        """Look, at most once in `LOOK_SECONDS`; returns how many jobs were failed. `model`: that of this worker."""
        now = self._monotonic()
        passed = LOOK_SECONDS if self._looked is None else now - self._looked
        if passed < LOOK_SECONDS:
            return 0
        first, self._looked = self._looked is None, now
        waits: dict[ModelId, _Wait] = {}
        refused = 0
        for wanted, oldest in self._store.other_models(model).items():
            wait = self._waits.get(wanted)
            if wait is None or wait.oldest != oldest:
                if wait is None:
                    log.warning("jobs wait for a model that no worker has", wanted=wanted.name, here=model.name)
                wait = _Wait(oldest)
            elif not first:
                wait.seconds += LOOK_SECONDS
            waits[wanted] = wait
            if wait.seconds >= self._patience:
                refused += self._store.refuse_model(wanted, _gone(wanted, model))
                log.error("jobs were accepted for a model that no worker has", wanted=wanted.name, jobs=refused)
        self._waits = waits
        return refused


def _gone(wanted: ModelId, here: ModelId) -> JobError:
    if wanted.name == here.name:
        what = f"This job was accepted for other weights of {wanted.name} than the server has now."
        return JobError(MODEL_CHANGED, f"{what} Submit it anew, or serve those weights again and then submit it.")
    what = f"This job was accepted for the model {wanted.name}; the server has {here.name} now."
    return JobError(MODEL_CHANGED, f"{what} Submit it anew to this model, or to a server that has the other one.")
