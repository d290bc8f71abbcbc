"""A whole server with the real engine, killed at random: nothing lost, nothing made twice, the same frames."""

import json
import os
import random
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from real_server import LONG, PROMPT, Server, serving, wait_until

from wanduet.jobs.files import JobFiles
from wanduet.jobs.store import JobStore

JOBS = int(os.environ.get("WANDUET_REAL_JOBS", "5000"))
BATCH = 25
KILLS = int(os.environ.get("WANDUET_KILLS", "200"))
OPEN_JOBS = 3  # there is always one that runs, one that is encoded ahead and one that waits
WHOM = ("worker", "server", "both")

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="POSIX signals and /proc"),
    pytest.mark.slow,
    pytest.mark.timeout(4 * 3600),
]


def test_killed_at_random_every_video_is_made_once_with_the_same_frames(tmp_path: Path, record_property: Any) -> None:
    data, dice = tmp_path / "data", random.Random(0)
    # Every death is the test's own doing, and none the fault of a job.
    flags = ("--no-page", "--checkpoint-seconds", "0.2", "--max-crashes", "1000")
    ids: list[str] = []
    gaps: list[float] = []  # seconds from a kill until a living worker holds a job again
    with serving(data, *flags) as server:
        first = server.create("job", **LONG, seed="5")["id"]
        assert server.wait(first)["status"] == "completed"
        want = server.frames(first)
    store = JobStore(JobFiles(data))
    killed = 0.0
    for kill in range(KILLS):
        whom = WHOM[kill % 3]
        with serving(data, *flags) as server:
            while len(store.list(limit=OPEN_JOBS, status="queued").jobs) < OPEN_JOBS:
                ids.append(server.create("job", **LONG, seed="5")["id"])
            if whom == "worker" or dice.random() < 0.75:  # else killed while it starts
                worker = goes_on(store, server)
                gaps += [time.monotonic() - killed] if killed else []
            time.sleep(dice.uniform(0.0, 5.0))
            family = psutil.Process(server.process.pid).children()
            killed = time.monotonic()
            if whom == "worker":
                os.kill(worker, signal.SIGKILL)
                goes_on(store, server, after=worker)
                gaps.append(time.monotonic() - killed)
                time.sleep(dice.uniform(0.0, 1.0))
                family = psutil.Process(server.process.pid).children()
                killed = time.monotonic()
            if whom != "server":  # a server's worker hears that it is gone, and drains: the milder way
                for child in family:
                    child.kill()
            server.process.kill()
            server.process.wait()
            psutil.wait_procs(family, timeout=60)
    with serving(data, *flags) as server:
        lost, differ = check(server, ids, want)
    log = [json.loads(line) for line in (data / "server.log").read_text().splitlines() if line.startswith("{")]
    store.sweep()
    left = [path.name for name in ("work", "checkpoints") for path in (data / name).iterdir()]
    videos = list((data / "videos").glob("*.mp4"))
    ended = [line["job"] for line in log if line.get("outcome") == "completed"]
    store.close()
    found = {
        "kills": KILLS,
        "jobs": len(ids),
        "lost": len(lost),
        "made twice": len(ended) - len(set(ended)),
        "different": len(differ),
        "resumed": sum("Going on after step" in line["event"] for line in log),
        "seconds to go on, median": round(statistics.median(gaps), 1) if gaps else None,
        "seconds to go on, max": round(max(gaps), 1) if gaps else None,
    }
    print(found)
    for name, value in found.items():
        record_property(name, value)
    assert (lost, differ, left, found["made twice"]) == ([], [], [], 0)
    assert len(videos) == len(ids) + 1, "no video was published twice"


def test_many_short_jobs_leave_nothing_in_the_worker(tmp_path: Path, record_property: Any) -> None:
    """Each with a prompt of its own, a fifth cancelled; the fake engine's ten thousand are in tests/faults."""
    data, seen = tmp_path / "data", []
    with serving(data, "--no-page") as server:
        store = JobStore(JobFiles(data))
        worker, service = psutil.Process(server.worker()), psutil.Process(server.process.pid)
        for batch in range(JOBS // BATCH):
            ids = [server.create(f"{PROMPT}, number {batch * BATCH + number}")["id"] for number in range(BATCH)]
            for video_id in ids[::5]:
                server.http.post(f"/v1/videos/{video_id}/cancel")
            wait_until(lambda: not store.statistics().by_status.keys() & {"queued", "in_progress"}, 600)
            seen.append((worker.memory_info().rss, worker.num_fds(), worker.num_threads(), service.memory_info().rss))
        assert server.worker() == worker.pid, "it was never started again"
        store.close()
    # Memory swings with each job; what is never given back is seen in the least of many looks.
    quarters = np.array([np.min(part, axis=0) for part in np.array_split(np.array(seen, float), 4)])
    slopes = ((quarters[3] - quarters[1]) / (JOBS / 2 / 1000)).tolist()
    found = {
        "jobs": JOBS,
        "worker's bytes for 1,000 jobs": round(slopes[0]),
        "worker's least bytes in each quarter": quarters[:, 0].astype(int).tolist(),
        "server's bytes for 1,000 jobs": round(slopes[3]),
        "file handles for 1,000 jobs": round(slopes[1], 2),
        "threads for 1,000 jobs": round(slopes[2], 2),
    }
    print(found)
    for name, value in found.items():
        record_property(name, value)
    assert slopes[0] < 3e6, "the embeddings of each prompt would be about as much"
    assert abs(slopes[1]) < 5
    assert abs(slopes[2]) < 5


def goes_on(store: JobStore, server: Server, after: int | None = None) -> int:
    """Wait until a worker that lives, and is another than `after`, holds a job; its process id."""
    held: list[int] = []

    def holds() -> bool:
        living = {child.pid for child in psutil.Process(server.process.pid).children()} - {after}
        held[:] = [pid for pulse in store.pulses() if (pid := int(pulse.worker.split(".")[1])) in living]
        return bool(held)

    wait_until(holds, 120)
    return held[0]


def check(server: Server, ids: list[str], want: np.ndarray) -> tuple[list[str], list[str]]:
    """Jobs that are not completed, and jobs whose frames are others."""
    lost, differ = [], []
    for video_id in ids:
        if server.wait(video_id)["status"] != "completed":
            lost.append(video_id)
        elif not np.array_equal(server.frames(video_id), want):
            differ.append(video_id)
    return lost, differ
