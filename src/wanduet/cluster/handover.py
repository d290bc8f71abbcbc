"""Decides when a job's decode is left to a decoder, and when a replica takes one back. Pure, except for a clock.

A decoder may be gone while the list of replicas still shows it. So a decode that is left is a job in the queue like any
other, and a replica that sees it wait for too long takes it itself.
"""

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from wanduet.cluster.scheduler import Waiting
from wanduet.jobs.records import DECODE, StoredJob

DECODER = " decode"  # suffix of a decoder's shape name
PATIENCE_SECONDS = 30.0  # how long a decode may wait at the head of its group before replicas take it
LATEST_ATTEMPT = 2  # of a job that may leave its decode: later attempts decode where they denoise


class TakeBack:
    """A replica's record of decodes that no decoder takes. Not thread-safe."""

    def __init__(self, seconds: float = PATIENCE_SECONDS, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._monotonic = monotonic
        self._seen: dict[str, float] = {}

    def __call__(self, waiting: Iterable[Waiting], decoders: Callable[[], Collection[str]]) -> list[Waiting]:
        """Return what the replica may take: whole jobs, decodes that waited too long; all if there is no decoder."""
        found = list(waiting)
        left = [one for one in found if one.demand.startswith(DECODE)]
        now = self._monotonic()
        self._seen = {one.job_id: self._seen.get(one.job_id, now) for one in left}
        if not left or not decoders():
            return found
        early = {one.job_id for one in left if now - self._seen[one.job_id] < self._seconds}
        return [one for one in found if one.job_id not in early]


@dataclass(frozen=True, slots=True)
class Handover:
    """How a replica that does whole jobs divides their decodes with decoders.

    `fits(shape, demand)` returns whether a decode demand fits a decoder's shape; `take_back` keeps the replica from
    taking decodes that decoders will do.
    """

    fits: Callable[[str, str], bool]
    take_back: TakeBack = field(default_factory=TakeBack)


def leaves_decode(job: StoredJob, decoders: Collection[str], queued: int, fits: Callable[[str], bool]) -> bool:
    """Return whether a replica leaves a job's decode to decoders.

    It does if the job fits one of them and fewer decodes wait than there are decoders, so that decoders are busy and
    replicas never idle for them. `decoders` are the shapes of ready decoders; `queued` is the number of waiting
    decodes.
    """
    if job.crashes or job.attempts > LATEST_ATTEMPT or queued >= len(decoders):
        return False
    return any(fits(shape) for shape in set(decoders))


def ready_decoders(replicas: Iterable[dict[str, Any]]) -> list[str]:
    """Return the shapes of the decoders that take jobs, in the controller's last list of replicas."""
    return [one["shape"] for one in replicas if one["state"] == "ready" and one["shape"].endswith(DECODER)]
