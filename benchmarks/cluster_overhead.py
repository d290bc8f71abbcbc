"""What the cluster path costs beside the local one: the same jobs through `wanduet serve` with a worker beside it
(SQLite), and through `wanduet serve --cluster` with one replica of one node (Ray, PostgreSQL).

    PYTHONPATH=src python benchmarks/cluster_overhead.py [--rounds 10] [--kinds small,long,usual]

Both servers run all the time and take turns, so that the machine's moods meet both. `latency`: one job at a time, from
its row to its completion. `throughput`: a batch at once. Goals: 50 ms a job, 1 % of throughput.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from _common import TINY, Report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "cluster"))

from fleet import LONG, SMALL, fleet, wait
from real_server import Server, serving

from wanduet.jobs.files import JobFiles
from wanduet.jobs.store import JobStore

KINDS = {
    "small": SMALL,
    "long": {**LONG, "num_inference_steps": "20" if TINY else "150"},
    # What the miniature makes if nothing is said.
    "usual": {"size": "96x96", "num_frames": "33", "num_inference_steps": "2" if TINY else "20", "guidance_scale": "3"},
}


def run_jobs(server: Server, store: JobStore, fields: dict[str, str], count: int) -> float:
    """Seconds from the first job's submission to the last one's completion, by their rows: polling costs CPU time."""
    ids = [server.create(**{**fields, "seed": str(index)})["id"] for index in range(count)]
    while not all(store.get(job_id).finished for job_id in ids):
        time.sleep(0.1)
    found = [store.get(job_id) for job_id in ids]
    return max(job.completed_at or 0.0 for job in found) - min(job.created_at for job in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1 if TINY else 10)
    parser.add_argument("--batch", type=int, default=2 if TINY else 6)
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS))
    options = parser.parse_args()
    report = Report("cluster_overhead")
    threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        for name in ("local", "cluster"):
            (Path(folder) / name).mkdir()
        flags = ("--min-replicas", "1", "--max-replicas", "1")
        with (
            serving(Path(folder) / "local", "--no-page", "--devices", "cpu") as local,
            closing(JobStore(JobFiles(Path(folder) / "local"))) as store,
            fleet(Path(folder) / "cluster", {"node": "1x24GiB"}, *flags, cpus=threads) as cluster,
        ):
            wait("the replica is ready", cluster.replicas)
            paths = {"local": (local, store), "cluster": (cluster.server, cluster.store)}
            for one in paths.values():
                run_jobs(*one, KINDS["long"], 1)  # loads the models
            for kind in options.kinds:
                fields = KINDS[kind]
                for section, count in (("latency", 1), ("throughput", options.batch)):
                    seconds: dict[str, list[float]] = {name: [] for name in paths}
                    for turn in range(options.rounds):
                        for name in sorted(paths, reverse=bool(turn % 2)):
                            seconds[name].append(run_jobs(*paths[name], fields, count) / count)
                    report.add(section, **compare(kind, seconds))
                    report.write()
    report.print()


def compare(kind: str, seconds: dict[str, list[float]]) -> dict[str, object]:
    """Medians of seconds a job, the fastest rounds, which other programs disturbed least, and what the cluster adds:
    the median of the differences in each round.
    """
    pairs = list(zip(seconds["local"], seconds["cluster"], strict=True))
    local = statistics.median(seconds["local"])
    added = statistics.median(cluster - here for here, cluster in pairs)
    return {
        "jobs": kind,
        "rounds": len(pairs),
        "local_s": round(local, 4),
        "cluster_s": round(statistics.median(seconds["cluster"]), 4),
        "local_fastest_s": round(min(seconds["local"]), 4),
        "cluster_fastest_s": round(min(seconds["cluster"]), 4),
        "added_ms_a_job": round(1e3 * added, 1),
        "added_percent": round(100 * added / local, 2),
    }


if __name__ == "__main__":
    main()
