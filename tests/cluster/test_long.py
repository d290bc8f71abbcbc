"""The long form: 50 jobs over three nodes, workers and nodes killed at random, a drain, the head's death; and the same
with nodes that find each other's files in a store.
"""

import os
import random
import threading
import time
from pathlib import Path

import pytest
from fleet import BIG, LONG, SMALL, Fleet, Local, fleet, kill_worker, mixed_nodes, wait

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="POSIX signals"),
    pytest.mark.timeout(3600),
]
JOBS, STORED_JOBS = 50, 40
STORED = {"a": "1x24GiB", "b": "1x24GiB"}
DECODED = {**SMALL, "size": "64x64", "num_frames": "17"}  # seconds to decode
COLOURS = ("red", "green", "blue", "white", "yellow")
LIMIT = 1800.0  # seconds until all jobs must be done
SEED = int(os.environ.get("WANDUET_TEST_SEED", time.time_ns() % 10_000))


class Trouble:
    """Kills, drains and restarts until told to stop, in a random order; writes down what it did."""

    def __init__(self, cluster: Fleet) -> None:
        self.cluster = cluster
        self.draw = random.Random(SEED)
        self.done: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Trouble":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        deeds = [self.kill_a_worker] * 6 + [self.kill_a_node] * 3 + [self.drain_a_node] * 2
        self.draw.shuffle(deeds)
        deeds.insert(2, self.kill_the_head)  # early: the jobs must not be over before it
        for deed in deeds:
            if self._stop.wait(self.draw.uniform(2, 10)):
                return
            deed()

    def kill_a_worker(self) -> None:
        if workers := [one["worker"] for one in self.cluster.replicas() if one["worker"]]:
            kill_worker(self.draw.choice(workers))
            self.done.append("worker killed")

    def kill_a_node(self) -> None:
        name = self.draw.choice(sorted(self.cluster.ray.nodes))
        self.cluster.ray.kill(name)
        self.done.append(f"node {name} killed")
        time.sleep(self.draw.uniform(0, 5))
        self.cluster.ray.add(name, self.cluster.nodes[name])

    def drain_a_node(self) -> None:
        name = self.draw.choice(sorted(self.cluster.ray.nodes))
        node = self.cluster.ray.nodes[name][:12]
        self.cluster.store.drain_node(node)
        time.sleep(5)  # however far it came: a drain that is called off half-way is a case too
        self.cluster.store.undrain_node(node)
        self.done.append(f"node {name} drained")

    def kill_the_head(self) -> None:
        """Nodes do not outlive a head that had no Redis; all of them come back under a new one."""
        ray = self.cluster.ray
        port = int(ray.address.rpartition(":")[2])
        ray.kill("head")
        for name in sorted(ray.nodes):
            ray.kill(name)
        time.sleep(3)
        assert ray.head(port) == ray.address
        for name, gpus in self.cluster.nodes.items():
            ray.add(name, gpus)
        self.done.append("head killed")


def test_fifty_jobs_survive_everything(tmp_path: Path) -> None:
    flags = ("--min-replicas", "3", "--parallel", "1", "--checkpoint-seconds", "0.2", "--max-crashes", "20")
    (tmp_path / "data").mkdir()
    (tmp_path / "local").mkdir()
    local = Local(tmp_path / "local")
    draw = random.Random(SEED)
    with fleet(tmp_path / "data", mixed_nodes(2), *flags) as cluster:
        wait("three replicas are ready", lambda: len(cluster.replicas()) == 3)
        kinds = [draw.choices([SMALL, LONG, BIG], [4, 5, 1])[0] for _ in range(JOBS)]
        ids = [cluster.server.create(seed=str(seed % 5), **fields)["id"] for seed, fields in enumerate(kinds)]
        with Trouble(cluster) as trouble:
            wait("all jobs are finished", lambda: cluster.finished(ids), LIMIT)
        jobs = cluster.check(ids, local)
        # A worker that was killed between its videos and its report told no name.
        cluster.check_fits([job for job in jobs if job.report.get("worker") in cluster.shapes])
        print(f"seed {SEED}: {trouble.done}; attempts {sum(job.attempts for job in jobs)}")
    local.close()
    assert len(trouble.done) >= 3
    assert "head killed" in trouble.done


def test_forty_jobs_survive_everything_with_their_files_in_a_store(tmp_path: Path) -> None:
    for name in ("data", "local", "store"):
        (tmp_path / name).mkdir()
    flags = ("--min-replicas", "2", "--checkpoint-seconds", "0.2", "--max-crashes", "20")
    draw = random.Random(SEED)
    with fleet(tmp_path / "data", STORED, *flags, "--storage", f"file://{tmp_path / 'store'}") as cluster:
        wait("two replicas are ready", lambda: len(cluster.replicas()) >= 2)
        kinds = [draw.choices([SMALL, DECODED, LONG], [3, 5, 2])[0] for _ in range(STORED_JOBS)]
        ids = [
            cluster.server.create(f"a {draw.choice(COLOURS)} circle", seed=str(seed % 4), **fields)["id"]
            for seed, fields in enumerate(kinds)
        ]
        with Trouble(cluster) as trouble:
            wait("all jobs are finished", lambda: cluster.finished(ids), LIMIT)
        local = Local(tmp_path / "local")
        jobs = cluster.check(ids, local)
        local.close()
        print(f"seed {SEED}: {trouble.done}; attempts {sum(job.attempts for job in jobs)}")
        wait("nothing is left in the store", lambda: not list((tmp_path / "store" / "work").glob("*/*")))
    assert len(trouble.done) >= 3
