"""Workers and submitters killed at random moments and at every named place: nothing lost, nothing made twice."""

import os
import random
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
from job_workers import (
    FAKE_FOLDER,
    Workers,
    assert_exactly_once,
    journal,
    open_store,
    published,
    submit,
    supervised,
    wait,
)

from tests.forked import start_program

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")

KILLS = int(os.environ.get("WANDUET_STORE_KILLS", "3000"))
FAILPOINTS = tuple(
    f"{place}:{when}"
    for place in (
        "JobStore.claim",
        "JobStore.progress",
        "JobStore.complete",
        "JobStore.recover",
        "JobStore.expire",
        "JobStore.sweep",
        "JobFiles.note_checkpoints",
        "JobFiles.publish",
        "JobFiles.publish_bytes",
        "JobFiles.remove_older",
        "JobFiles.discard_work",
    )
    for when in ("before", "after")
)


def report(record_property: Any, gaps: list[float], **counts: int) -> None:
    found: dict[str, Any] = {
        **counts,
        "seconds to go on, median": round(statistics.median(gaps), 3),
        "seconds to go on, max": round(max(gaps), 3),
    }
    for name, value in found.items():
        record_property(name, value)
    print(found)


def attack_two_workers(data: Path, kills: int, record_property: Any) -> None:
    """Two workers share a store; again and again one of them is killed and replaced."""
    dice = random.Random(0)
    store = open_store(data)
    workers = Workers(data)
    ids: list[str] = []
    gaps: list[float] = []
    line = data / "journal"
    workers.start()
    for _ in range(kills):
        while len(store.list(limit=4, status="queued").jobs) < 4:
            ids.append(submit(store, f"job {len(ids)}", steps=dice.randint(5, 30), seed=len(ids)))
        workers.start()
        time.sleep(dice.uniform(0.0, 0.25))
        workers.kill_one(dice)
        killed, size = time.monotonic(), line.stat().st_size if line.exists() else 0
        wait(lambda size=size: line.exists() and line.stat().st_size > size)
        gaps.append(time.monotonic() - killed)
    wait(lambda: not store.statistics().by_status.keys() & {"queued", "in_progress"}, 600)
    assert workers.stop() == [0]
    attempts = sum(store.get(job_id).attempts for job_id in ids)
    report(record_property, gaps, kills=kills, jobs=len(ids), attempts=attempts)
    assert attempts > len(ids), "kills that hit no job show nothing"
    assert_exactly_once(store, ids)
    store.close()


def test_two_workers_killed_at_random_lose_nothing(tmp_path: Path, record_property: Any) -> None:
    attack_two_workers(tmp_path, 20, record_property)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_thousands_of_kills_lose_nothing(tmp_path: Path, record_property: Any) -> None:
    attack_two_workers(tmp_path, KILLS, record_property)


def attack_a_supervised_worker(data: Path, kills: int, record_property: Any) -> None:
    """The worker as the server has it: killed while it starts or while it works, and started again."""
    dice = random.Random(0)
    store = open_store(data)
    supervisor = supervised(data)
    supervisor.start()
    ids: list[str] = []
    gaps: list[float] = []
    line = data / "journal"
    for kill in range(kills):
        while len(store.list(limit=3, status="queued").jobs) < 3:
            ids.append(submit(store, f"job {len(ids)}", steps=30, seed=len(ids)))
        starting = kill % 5 == 0
        pid = wait(lambda starting=starting: (starting or supervisor.trouble is None) and supervisor.pid)
        time.sleep(dice.uniform(0.0, 0.4))
        os.kill(pid, signal.SIGKILL)
        killed, size = time.monotonic(), line.stat().st_size if line.exists() else 0
        wait(lambda pid=pid: supervisor.pid not in (None, pid))
        if not starting:
            wait(lambda size=size: line.exists() and line.stat().st_size > size)
            gaps.append(time.monotonic() - killed)
    wait(lambda: all(store.get(job_id).finished for job_id in ids), 600)
    assert supervisor.stop() == 0
    report(record_property, gaps, kills=kills, jobs=len(ids))
    assert_exactly_once(store, ids)
    store.close()


def test_a_supervised_worker_killed_at_random_loses_nothing(tmp_path: Path, record_property: Any) -> None:
    attack_a_supervised_worker(tmp_path, 5, record_property)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_supervised_worker_killed_often_loses_nothing(tmp_path: Path, record_property: Any) -> None:
    attack_a_supervised_worker(tmp_path, 200, record_property)


def test_killed_at_every_named_place_nothing_is_lost(tmp_path: Path, record_property: Any) -> None:
    store = open_store(tmp_path)
    workers = Workers(tmp_path, FAILPOINTS)
    ids = [submit(store, f"job {number}", steps=5, seed=number) for number in range(len(FAILPOINTS))]
    for lease in [store.claim("elsewhere.1.a", 30.0) for _ in ids]:
        assert lease is not None
        store.release(lease)  # some places are reached only after the first attempt

    def finished() -> bool:
        return all(store.get(job_id).finished for job_id in ids)

    def missed() -> set[str]:
        return {point for point in FAILPOINTS if not (tmp_path / f"{point}.reached").exists()}

    for _ in FAILPOINTS:
        worker = workers.start()
        worker.join(120)
        assert worker.exitcode == -signal.SIGKILL
        workers.living.remove(worker)
    assert missed() == set()
    workers.start()
    wait(finished)
    assert workers.stop() == [0]
    record_property("kills", len(FAILPOINTS))
    assert_exactly_once(store, ids)
    store.close()


def test_killed_between_publishing_and_its_commit_leaves_no_file(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    job_id = submit(store, "orphan 2", seed=0)
    supervisor = supervised(tmp_path)
    supervisor.start()
    wait(lambda: store.get(job_id).finished)
    assert supervisor.stop() == 0
    job = store.get(job_id)
    assert (job.status, job.attempts, supervisor.restarts) == ("completed", 3, 2)
    assert published(store) == {file.name for file in job.files}, "the last attempt removes what others published"
    assert journal(tmp_path).count(f"{job_id} done") == 1
    store.close()


ACKNOWLEDGER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from fake_engine import open_store
from wanduet.jobs.records import NewJob
store = open_store(Path(sys.argv[1]))
while True:
    job = store.submit(NewJob("ann", "m", {"prompt": "x"})).job
    print(job.id, flush=True)
"""


def attack_submitters(data: Path, kills: int, record_property: Any) -> None:
    dice = random.Random(0)
    acknowledged: list[str] = []
    for _ in range(kills):
        process = start_program(ACKNOWLEDGER, [str(data), str(FAKE_FOLDER)], data, os.environ)
        assert process.stdout is not None
        acknowledged += [process.stdout.readline().strip() for _ in range(3)]  # it is in the midst of it
        time.sleep(dice.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate()
        acknowledged += [line.strip() for line in rest.splitlines(keepends=True) if line.endswith("\n")]
    store = open_store(data)
    assert len(acknowledged) >= 3 * kills
    lost = [job_id for job_id in acknowledged if store.get(job_id).status != "queued"]
    record_property("kills", kills)
    record_property("acknowledged", len(acknowledged))
    print({"kills": kills, "acknowledged": len(acknowledged), "lost": len(lost)})
    assert lost == []
    store.close()


def test_killed_while_submitting_every_acknowledged_job_is_there(tmp_path: Path, record_property: Any) -> None:
    attack_submitters(tmp_path, 6, record_property)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_often_killed_while_submitting_every_acknowledged_job_is_there(tmp_path: Path, record_property: Any) -> None:
    attack_submitters(tmp_path, 200, record_property)
