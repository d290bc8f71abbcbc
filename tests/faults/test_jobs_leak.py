"""Thousands of short jobs through a whole server, a fifth cancelled, a tenth deleted: nothing grows with them."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from job_server import server
from job_workers import open_store, wait

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and /proc")

JOBS = int(os.environ.get("WANDUET_JOBS", "10000"))
BATCH = 50
RUNNING, CANCELLED, DELETED = 0, (0, 5), (7,)  # of each ten jobs; `RUNNING` is caught in the middle
KINDS = ("rss_bytes", "files", "threads")
MEGABYTE = 1e6


def measure(pid: int) -> tuple[int, int, int]:
    process = psutil.Process(pid)
    with process.oneshot():
        return process.memory_info().rss, process.num_fds(), process.num_threads()


def run_jobs(folder: Path, num_jobs: int, record_property: Any) -> dict[str, dict[str, float]]:
    """Growth for 1,000 jobs of each kind in both processes, by a line through the later three quarters."""
    data = folder / "data"
    seen: dict[str, list[tuple[int, int, int]]] = {"server": [], "worker": []}
    cancelled = deleted = 0
    with server(data, step_seconds=0.0) as running:
        store = open_store(data)
        pids = {"server": running.process.pid, "worker": psutil.Process(running.process.pid).children()[0].pid}
        for batch in range(num_jobs // BATCH):
            ids = []
            for number in range(BATCH):
                # Those that are to be ended would otherwise be done before it.
                prompt = "hold 1" if number % 10 in CANCELLED + DELETED else f"job {batch}"
                form = {"prompt": prompt, "seed": str(number), "num_inference_steps": "2"}
                answer = running.http.post("/v1/videos", data=form)
                assert answer.status_code == 200, answer.text
                ids.append(answer.json()["id"])
            for number, video_id in enumerate(ids):
                if number % 10 == RUNNING:
                    wait(lambda video_id=video_id: store.get(video_id).phase == "denoise")
                if number % 10 in CANCELLED:
                    cancelled += running.http.post(f"/v1/videos/{video_id}/cancel").json()["status"] == "failed"
                elif number % 10 in DELETED:
                    assert running.http.delete(f"/v1/videos/{video_id}").status_code == 200
                    deleted += 1
            running.http.get(f"/v1/videos/{ids[1]}/events")  # until it is done
            wait(lambda: not store.statistics().by_status.keys() & {"queued", "in_progress"})
            running.http.get("/metrics")
            for name, pid in pids.items():
                seen[name].append(measure(pid))
            if (batch + 1) * BATCH % 1000 == 0:
                print((batch + 1) * BATCH, {name: rows[-1] for name, rows in seen.items()}, flush=True)
        counts = store.statistics().by_status
        # What a worker was still writing when its job was cancelled, it removes itself.
        wait(lambda: not any(store.files.work.iterdir()))
        running.process.terminate()
        assert running.process.wait(120) == 0
    names = {path.name for path in store.files.videos.iterdir()}
    assert (cancelled, deleted) == (num_jobs // 5, num_jobs // 10)
    assert (counts["failed"], sum(counts.values())) == (cancelled, num_jobs - deleted), "every row is there"
    assert len(names) == 3 * counts["completed"], "and every file, and no other"
    store.close()
    found: dict[str, dict[str, float]] = {}
    for name, rows in seen.items():
        later = np.array(rows[len(rows) // 4 :], float)
        jobs = np.arange(len(later)) * BATCH / 1000
        slopes = np.polyfit(jobs, later, 1)[0] if len(later) > 1 else np.zeros(3)
        found[name] = {kind: round(float(slope), 3) for kind, slope in zip(KINDS, slopes, strict=True)}
        first, last = rows[len(rows) // 4], rows[-1]
        found[name] |= {f"{kind} at the end": last[at] for at, kind in enumerate(KINDS)}
        found[name] |= {f"{kind} after a quarter": first[at] for at, kind in enumerate(KINDS)}
    print(json.dumps({"jobs": num_jobs, "rows": counts, "cancelled": cancelled, "deleted": deleted, **found}))
    record_property("jobs", num_jobs)
    record_property("growth for 1,000 jobs", json.dumps(found))
    return found


def test_a_hundred_jobs_leave_no_file_open_and_no_thread(tmp_path: Path, record_property: Any) -> None:
    for growth in run_jobs(tmp_path, 100, record_property).values():
        for kind in ("files", "threads"):  # one leaked by each job would be 50
            assert growth[f"{kind} at the end"] - growth[f"{kind} after a quarter"] < 40


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_ten_thousand_jobs_leak_nothing(tmp_path: Path, record_property: Any) -> None:
    for growth in run_jobs(tmp_path, JOBS, record_property).values():
        assert growth["rss_bytes"] < MEGABYTE
        assert abs(growth["files"]) < 1
        assert abs(growth["threads"]) < 1
