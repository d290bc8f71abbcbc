"""`wanduet serve --cluster`: workers and nodes are killed, emptied and unlike each other, and no job is any worse for it.

One cluster for the whole file: a node with a small GPU and one with a large one, both of them only declared.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet import BIG, LONG, SMALL, Fleet, Local, fleet, kill_worker, mixed_nodes, pid_of, wait
from real_server import serving

pytestmark = [pytest.mark.skipif(os.name != "posix", reason="POSIX signals"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    flags = ("--min-replicas", "2", "--parallel", "1", "--checkpoint-seconds", "0.2", "--max-steps", "1000")
    with fleet(tmp_path_factory.mktemp("data"), mixed_nodes(), *flags) as found:
        wait("two replicas are ready", lambda: len(found.replicas()) == 2)
        yield found


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    local = Local(tmp_path_factory.mktemp("local"))
    yield local
    local.close()


def test_jobs_survive_their_worker_and_their_node_and_land_only_where_they_fit(cluster: Fleet, local: Local) -> None:
    wanted = [LONG, LONG, LONG, SMALL, BIG, SMALL]
    ids = [cluster.server.create(seed=str(number % 2), **fields)["id"] for number, fields in enumerate(wanted)]
    first = wait("a job is under way", lambda: cluster.running(ids[0], 20.0))
    kill_worker(first)
    rest = ids[1:3]
    second = wait("another is under way", lambda: next(filter(None, (cluster.running(i, 20.0) for i in rest)), None))
    gone = cluster.name_of(cluster.node_of(second))
    cluster.ray.kill(gone)
    cluster.ray.add(gone, cluster.nodes[gone])
    jobs = cluster.check(ids, local)
    moved = max(jobs[1:3], key=lambda job: job.attempts)
    assert min(jobs[0].attempts, moved.attempts) >= 2
    for job in (jobs[0], moved):  # the last attempts went on from checkpoints
        assert 0 < job.report["steps"] < 0.9 * int(LONG["num_inference_steps"])
    cluster.check_fits(jobs)


def test_a_drained_node_gives_its_job_up_without_losing_a_step_and_the_end_leaves_nothing(
    cluster: Fleet, local: Local
) -> None:
    wait("two replicas are ready", lambda: len(cluster.replicas()) >= 2)
    steps = 300
    job_id = cluster.server.create(seed="70", **{**LONG, "num_inference_steps": str(steps)})["id"]
    worker = wait("it is under way", lambda: cluster.running(job_id, 10.0))
    node = cluster.node_of(worker)
    seen = cluster.steps_done(job_id)
    cluster.store.drain_node(node[:12])
    (job,) = cluster.check([job_id], local)
    assert (job.attempts, job.crashes) == (2, 0)
    assert job.report["worker"] != worker
    assert job.report["steps"] <= steps - seen
    wait("nothing runs there", lambda: all(one["worker"] != worker for one in cluster.store.replicas()))

    pids = [pid_of(one["worker"]) for one in cluster.replicas()]
    cluster.server.process.terminate()
    assert cluster.server.process.wait(120) == 0
    wait("their processes are gone", lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert cluster.store.replicas() == []


def test_an_api_that_is_no_node_reaches_the_cluster_through_rays_client(cluster: Fleet, local: Local) -> None:
    flags = ("--no-page", "--cluster", cluster.ray.client_address, "--database-url", cluster.url)
    for name in tuple(cluster.store.drained_nodes()):
        cluster.store.undrain_node(name)
    with serving(cluster.folder, *flags) as cluster.server:  # the one before has ended
        wait("a replica is ready", cluster.replicas)
        cluster.check([cluster.server.create(seed="80", **SMALL)["id"]], local)
