"""Orders the waiting jobs for a replica. Pure: no clock, database or Ray.

Every replica computes the order itself, so there is no scheduler process that could fail. Its criteria, first to last:

1. *Priority*, as on one machine.
2. *Fairness between owners*: start-time fair queueing (Goyal, Vin, Cheng 1996). Each claim charges its owner the job's
   predicted device-seconds in virtual time; the owner with the smallest start tag goes first. Owners do not accumulate
   credit while they submit nothing, and do not pay for capacity that no other owner wanted.
3. *Between one owner's jobs*, the highest response ratio: waited time over predicted time, plus one (Brinch Hansen
   1971). Small jobs pass big ones, and a big one's ratio grows until it is next.
4. A job that has waited longer than `patience_seconds`, and ten times as long as it will take, is ordered by age alone,
   before its owner's other jobs: under overload, ratios alone could delay big jobs without a bound.

Jobs that do not fit the replica are ignored, so a replica never waits for one and is never blocked by one.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from wanduet.cluster.fit import FitOf

PATIENCE_SECONDS = 900.0
OVERDUE_RATIO = 10.0  # of waited to predicted time
SHORTEST_SECONDS = 1.0  # lower bound: shorter predictions are unreliable, and ratios would explode


@dataclass(frozen=True, slots=True)
class Waiting:
    """The queued jobs of one owner, demand and priority, represented by the oldest, which goes first.

    `since`: Unix time of its submission in seconds.
    """

    owner: str
    demand: str
    priority: int
    job_id: str
    since: float
    count: int = 1


@dataclass(frozen=True, slots=True)
class Share:
    """An owner's position in virtual time (device-seconds): start of its newest job, earliest start of its next."""

    start: float = 0.0
    finish: float = 0.0


@dataclass(frozen=True, slots=True)
class Pick:
    """A job to try to claim, and the charge for it."""

    waiting: Waiting
    device_seconds: float


def order(
    waiting: Iterable[Waiting],
    shares: Mapping[str, Share],
    fit_of: FitOf,
    now: float,
    *,
    devices: int = 1,
    patience_seconds: float = PATIENCE_SECONDS,
) -> list[Pick]:
    """Return what a replica of `devices` GPUs should try to claim, best first; empty if no waiting job fits it."""
    virtual = max((share.start for share in shares.values()), default=0.0)
    found: list[tuple[tuple[float, ...], str, Pick]] = []
    for one in waiting:
        fit = fit_of(one.demand)
        if not fit.fits:
            continue
        seconds = max(fit.seconds, SHORTEST_SECONDS)
        waited = max(0.0, now - one.since)
        overdue = waited > max(patience_seconds, OVERDUE_RATIO * seconds)
        tag = max(virtual, shares.get(one.owner, Share()).finish)
        urgency = waited if overdue else 1.0 + waited / seconds
        key = (-one.priority, tag, not overdue, -urgency)
        found.append((key, one.job_id, Pick(one, seconds * max(1, devices))))
    return [pick for _, _, pick in sorted(found, key=lambda entry: entry[:2])]


def charge(finish: Any, virtual: Any, device_seconds: Any, later: Callable[[Any, Any], Any] = max) -> tuple[Any, Any]:
    """Return the owner's new start and finish after a claim, in device-seconds.

    `finish`: the owner's previous finish; `virtual`: the largest start of all owners. SQL columns work as well as
    numbers if `later` returns the greater of two.
    """
    start = later(finish, virtual)
    return start, start + device_seconds
