"""Claims in the scheduler's order keep every promise of the store: one worker a job, fences, no job lost."""

import sqlite3
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))

from fake_engine import postgres_url

from wanduet.cluster.fit import Fit
from wanduet.cluster.store import ClusterStore, shares
from wanduet.jobs.files import JobFiles
from wanduet.jobs.records import JobError, NewJob, StaleLeaseError
from wanduet.jobs.store import JobStore

SMALL = {"prompt": "x", "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.0}
BIG = SMALL | {"height": 640}
SECONDS = {"32": 10.0, "640": 500.0}


def fits(*heights: str) -> object:
    return lambda demand: Fit(demand.split("x")[0] in heights, SECONDS[demand.split("x")[0]])


@pytest.fixture
def open_cluster(tmp_path: Path) -> Iterator[object]:
    opened: list[ClusterStore] = []

    def open_store(**options: object) -> ClusterStore:
        store = ClusterStore(JobFiles(tmp_path), postgres_url(tmp_path), **options)
        opened.append(store)
        return store

    yield open_store
    for store in opened:
        store.close()


def submit(store: JobStore, request: dict = SMALL, owner: str = "ann", **options: object) -> str:
    return store.submit(NewJob(owner, "m", request, **options)).job.id


def test_a_replica_takes_only_what_fits(open_cluster) -> None:
    small = open_cluster(fit_of=fits("32"))
    big, little = submit(small, BIG), submit(small)
    assert small.claim("w", 30.0).job.id == little
    assert small.claim("w", 30.0) is None
    assert open_cluster(fit_of=fits("32", "640")).claim("v", 30.0).job.id == big
    assert open_cluster().claim("nobody", 30.0) is None


def test_within_a_group_the_oldest_goes_first(open_cluster) -> None:
    store = open_cluster(fit_of=fits("32"))
    jobs = [submit(store) for _ in range(5)]
    assert [store.claim("w", 30.0).job.id for _ in jobs] == jobs


def test_owners_take_turns_however_long_the_queue_of_one_is(open_cluster) -> None:
    store = open_cluster(fit_of=fits("32"))
    for _ in range(6):
        submit(store, owner="flood")
    for _ in range(3):
        submit(store, owner="drop")
    owners = [store.claim("w", 30.0).job.owner for _ in range(6)]
    assert sorted(owners[:4]) == ["drop", "drop", "flood", "flood"]
    assert owners.count("drop") == 3


def test_a_job_that_crashed_is_claimed_alone(open_cluster) -> None:
    store = open_cluster(fit_of=fits("32"))
    submit(store)
    store.retry(store.claim("w", 30.0), JobError("x", "x"), 3)
    assert store.claim("w", 30.0, alone=False) is None
    assert store.claim("w", 30.0, alone=True) is not None


def claim_together(store: ClusterStore, claimers: int = 4) -> list[str]:
    """Claim and complete all there is, from several threads with a store each; the ids in the order of the claims."""
    taken: list[str] = []
    barrier = threading.Barrier(claimers)

    def work(name: str) -> None:
        url = postgres_url(store.files.folder)
        with closing(ClusterStore(store.files, url, fit_of=fits("32", "640"))) as mine:
            barrier.wait()
            while (lease := mine.claim(name, 30.0)) is not None:
                taken.append(lease.job.id)
                mine.complete(lease, [], {"timings": {"denoise_s": 2.0}})

    with ThreadPoolExecutor(claimers) as pool:
        for done in [pool.submit(work, f"w{i}") for i in range(claimers)]:
            done.result()
    while (lease := store.claim("last", 30.0)) is not None:  # a claimer may have given up while others held all heads
        taken.append(lease.job.id)
        store.complete(lease, [], {"timings": {"denoise_s": 2.0}})
    return taken


def test_many_claimers_never_share_a_job_and_leave_none(open_cluster) -> None:
    store = open_cluster(fit_of=fits("32", "640"))
    jobs = {submit(store, (SMALL, BIG)[i % 2], f"owner{i % 3}") for i in range(40)}
    taken = claim_together(store)
    assert len(taken) == len(set(taken)) == 40
    assert set(taken) == jobs
    assert store.statistics().stages["denoise_s"] == (80.0, 40)


def test_claims_at_the_same_time_are_all_charged(open_cluster) -> None:
    store = open_cluster(fit_of=fits("32"))
    for _ in range(20):
        submit(store)
    claim_together(store)
    with store.database.connect() as connection:
        assert connection.execute(sa.select(shares)).all() == [("ann", 190.0, 200.0)]


def test_a_stale_lease_of_an_ordered_claim_is_refused(open_cluster) -> None:
    store = open_cluster(fit_of=fits("32"))
    submit(store)
    lease = store.claim("w", 30.0)
    store.recover(store.pulses()[0], 3)
    again = store.claim("v", 30.0)
    with pytest.raises(StaleLeaseError):
        store.complete(lease, [])
    assert store.complete(again, []).status == "completed"


def test_what_fits_nowhere_is_failed_with_a_reason(open_cluster) -> None:
    store = open_cluster()
    jobs = [submit(store, BIG), submit(store, BIG)]
    kept = submit(store)
    group = next(one for one in store.waiting() if one.demand.startswith("640"))
    assert (group.count, store.refuse(group, "controller", JobError("does_not_fit", "Too large."))) == (2, 2)
    assert [store.get(job).error.code for job in jobs] == ["does_not_fit"] * 2
    assert store.get(kept).status == "queued"


def test_the_backlog_is_counted_by_demand(open_cluster) -> None:
    store = open_cluster()
    for owner in ("a", "b", "c"):
        submit(store, owner=owner)
    submit(store, BIG)
    assert sorted((one.demand, one.count) for one in store.backlog(store.waiting())) == [
        ("32x32x5/2/1/1", 3),
        ("640x32x5/2/1/1", 1),
    ]


def test_nodes_to_drain_and_the_list_of_replicas_are_kept(open_cluster) -> None:
    store = open_cluster()
    store.drain_node("a")
    store.drain_node("a")
    assert open_cluster().drained_nodes() == {"a"}
    assert (store.undrain_node("a"), store.undrain_node("a")) == (True, False)
    row = {"id": "r", "node": "a", "shape": "1x24GiB", "state": "ready", "worker": "w", "jobs": 1}
    store.publish([row])
    store.publish([row])
    assert store.replicas() == [row]


def test_a_database_of_the_first_version_gets_its_demands(tmp_path: Path) -> None:
    with closing(JobStore(JobFiles(tmp_path))) as store:
        job = submit(store, BIG)
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as old:
        old.execute("DROP INDEX jobs_by_demand")
        old.execute("ALTER TABLE jobs DROP COLUMN demand")
        old.execute("UPDATE state SET version = 1")
    old.close()
    with closing(ClusterStore(JobFiles(tmp_path), fit_of=fits("640"))) as cluster:
        assert cluster.claim("w", 30.0).job.id == job
        assert cluster.waiting() == ()
