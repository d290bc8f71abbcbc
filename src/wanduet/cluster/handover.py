"""When a job's decode is left to a decoder, and when a replica takes one back. Pure, but for the clock it is given.

A decoder may be gone while the list of replicas still shows it, and nobody's clock says so. So a decode that is left is
a job in the queue like any other, and a replica that sees the same one wait there for too long does it itself.
"""

import time
from collections.abc import Callable, Collection, Iterable
from typing import Any

from wanduet.cluster.scheduler import Waiting
from wanduet.jobs.records import DECODE, StoredJob

DECODER = " decode"  # ends the name of a decoder's shape
PATIENCE_SECONDS = 30.0  # that a left decode may stand first in its group while replicas look on
LATEST_ATTEMPT = 2  # to leave its decode: what went back and forth stays where it is denoised


class TakeBack:
    """A replica's own watch over decodes that nobody takes. Not safe to use from several threads."""

    def __init__(self, seconds: float = PATIENCE_SECONDS, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._monotonic = monotonic
        self._seen: dict[str, float] = {}

    def __call__(self, waiting: Iterable[Waiting], decoders: Callable[[], Collection[str]]) -> list[Waiting]:
        """What the replica may take: whole jobs; decodes that wait too long, or at once where no decoder is."""
        found = list(waiting)
        left = [one for one in found if one.demand.startswith(DECODE)]
        now = self._monotonic()
        self._seen = {one.job_id: self._seen.get(one.job_id, now) for one in left}
        if not left or not decoders():
            return found
        early = {one.job_id for one in left if now - self._seen[one.job_id] < self._seconds}
        return [one for one in found if one.job_id not in early]


def leaves_decode(job: StoredJob, decoders: Collection[str], queued: int, fits: Callable[[str], bool]) -> bool:
    """Whether a replica leaves a job's decode: a decoder that it fits is there, and no more wait than decoders are, so
    that decoders are busy and replicas never idle for them.

    `decoders`: the shapes of those that are ready; `queued`: decodes that wait.
    """
    if job.crashes or job.attempts > LATEST_ATTEMPT or queued >= len(decoders):
        return False
    return any(fits(shape) for shape in set(decoders))


def ready_decoders(replicas: Iterable[dict[str, Any]]) -> list[str]:
    """The shapes of the decoders that take jobs, by what the controller last told."""
    return [one["shape"] for one in replicas if one["state"] == "ready" and one["shape"].endswith(DECODER)]
