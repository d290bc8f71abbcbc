"""The order in which replicas take jobs: fair between owners, small before big, nobody for ever last."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from wanduet.cluster.fit import Fit
from wanduet.cluster.scheduler import OVERDUE_RATIO, Share, Waiting, charge, order

SECONDS = {"small": 10.0, "big": 1000.0}
NOW = 100_000.0


def fit_of(demand: str) -> Fit:
    return Fit(demand in SECONDS, SECONDS.get(demand, 1.0))


def waiting(owner: str = "ann", demand: str = "small", waited: float = 0.0, priority: int = 0) -> Waiting:
    return Waiting(owner, demand, priority, f"video_{owner}{demand}{NOW - waited:012.3f}", NOW - waited)


def first(*found: Waiting, shares: dict[str, Share] | None = None, patience: float = 1e9) -> Waiting:
    return order(found, shares or {}, fit_of, NOW, patience_seconds=patience)[0].waiting


def test_what_does_not_fit_is_not_seen() -> None:
    assert order([waiting(demand="huge")], {}, fit_of, NOW) == []
    assert first(waiting(demand="huge", waited=500), waiting()).demand == "small"


def test_priority_comes_first() -> None:
    assert first(waiting(waited=500), waiting("bob", priority=1)).owner == "bob"


def test_small_jobs_pass_big_ones_until_those_have_waited_in_proportion() -> None:
    assert first(waiting(demand="big", waited=50), waiting(waited=1)).demand == "small"
    assert first(waiting(demand="big", waited=1000), waiting(waited=1)).demand == "big"


def test_whoever_waited_longer_than_patience_goes_by_age() -> None:
    """And ten times longer than it takes; until then the ratio decides."""
    older, newer = waiting(demand="big", waited=10_500), waiting(waited=10_400)
    assert first(older, newer, patience=20_000).demand == "small"
    assert first(older, newer, patience=900).demand == "big"
    early = waiting(demand="big", waited=9_000), waiting(waited=8_900)
    assert first(*early, patience=900).demand == "small"


def test_the_owner_who_used_least_goes_first_whatever_the_others_age() -> None:
    shares = {"ann": Share(100.0, 200.0), "bob": Share(0.0, 50.0)}
    assert first(waiting("ann", waited=5000), waiting("bob"), shares=shares, patience=10).owner == "bob"


def test_absence_saves_up_no_credit() -> None:
    """After a long absence an owner starts where the others are, and does not get everything for a while."""
    shares = {"ann": Share(5000.0, 5010.0), "bob": Share(0.0, 10.0)}
    taken = Counter[str]()
    for _ in range(20):
        pick = order([waiting("ann"), waiting("bob")], shares, fit_of, NOW)[0]
        owner = pick.waiting.owner
        virtual = max(share.start for share in shares.values())
        shares[owner] = Share(*charge(shares[owner].finish, virtual, pick.device_seconds))
        taken[owner] += 1
    assert abs(taken["ann"] - taken["bob"]) <= 1


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["small", "big"])), min_size=1, max_size=4))
def test_backlogged_owners_get_equal_device_time(kinds: list[tuple[str, str]]) -> None:
    """Start-time fair queueing's bound: two owners with work differ by at most one largest job of each."""
    demands = dict(kinds)
    shares: dict[str, Share] = {}
    used = Counter[str]()
    for _ in range(300):
        pick = order([waiting(owner, demand) for owner, demand in demands.items()], shares, fit_of, NOW)[0]
        owner = pick.waiting.owner
        virtual = max((share.start for share in shares.values()), default=0.0)
        shares[owner] = Share(*charge(shares.get(owner, Share()).finish, virtual, pick.device_seconds))
        used[owner] += pick.device_seconds
        times = [used[name] for name in demands]
        assert max(times) - min(times) <= 2 * max(SECONDS[demand] for demand in demands.values())


@given(st.integers(1, 200))
def test_a_big_job_under_a_stream_of_small_ones_is_served_before_it_is_overdue_for_long(seed: int) -> None:
    """One replica, one owner, a small job arriving for each that is taken: the big one still gets its turn."""
    now, arrived = 0.0, float(seed % 7)
    for turn in range(1100):
        big = Waiting("ann", "big", 0, "video_big", arrived)
        small = Waiting("ann", "small", 0, f"video_small{turn:05d}", max(0.0, now - seed))
        taken = order([big, small], {}, fit_of, now, patience_seconds=300.0)[0].waiting
        if taken is big:
            break
        now += SECONDS["small"]
    assert now - arrived <= OVERDUE_RATIO * SECONDS["big"] + SECONDS["small"]


def test_more_devices_are_charged_more() -> None:
    assert order([waiting()], {}, fit_of, NOW, devices=4)[0].device_seconds == 40.0
