"""What the cluster path costs beside the local one: the same jobs through `wanduet serve` with a worker beside it
(SQLite), and through `wanduet serve --cluster` with one replica of one node (Ray, PostgreSQL).

    PYTHONPATH=src python benchmarks/cluster_overhead.py [--rounds 10] [--kinds small,long,usual] [--threads 1]

Models compute with `--threads`, all cores but one if nothing is said: the rest is for the programs around them, as where
GPUs compute. Both servers run all the time and take turns, so that the machine's moods meet both. Each commit is on the
disk, in SQLite and in PostgreSQL. `latency`: one job at a time, from its row to its completion. `throughput`: a batch at
once, and the processor time that all processes of a path took meanwhile, which other programs disturb less. Goals: 50 ms
a job, 1 % of throughput. What is added is the median of the rounds' differences; `uncertain_ms` is two standard errors of
their mean. `beside`: the same of the seconds in which no denoise was under way, by what the engine reports of its jobs:
all that a path does between models, without the models' own noise; not what it takes from them by working beside them,
for which see the processor time. `standing`: what each path's processes take of one core while there is nothing to do;
Ray's do so in the local turns too, so the differences above are without it.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import sqlalchemy as sa
from _common import TINY, Report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "cluster"))

from fleet import LONG, SMALL, Fleet, fleet, wait
from real_server import Server, serving

from wanduet.jobs.files import JobFiles
from wanduet.jobs.store import JobStore

IDLE_SECONDS = 2.0 if TINY else 20.0
KINDS = {
    "small": SMALL,
    "long": {**LONG, "num_inference_steps": "20" if TINY else "150"},
    # What the miniature makes if nothing is said.
    "usual": {"size": "96x96", "num_frames": "33", "num_inference_steps": "2" if TINY else "20", "guidance_scale": "3"},
}


@dataclass(frozen=True, slots=True)
class Batch:
    """Seconds a job: of all, and without its denoise."""

    seconds: float
    beside: float


def run_jobs(server: Server, store: JobStore, fields: dict[str, str], count: int) -> Batch:
    """From the first job's submission to the last one's completion, by their rows: polling costs CPU time."""
    ids = [server.create(**{**fields, "seed": str(index)})["id"] for index in range(count)]
    found = []
    for job_id in ids:  # roughly in the order of their ends
        while not (job := store.get(job_id)).finished:
            time.sleep(0.1)
        found.append(job)
    seconds = max(job.completed_at or 0.0 for job in found) - min(job.created_at for job in found)
    denoise = sum(job.report["timings"]["denoise_s"] for job in found)
    return Batch(seconds / count, (seconds - denoise) / count)


def postmaster(cluster: Fleet) -> int:
    """The process of the cluster's PostgreSQL, which is no child of ours."""
    return int(Path(str(sa.make_url(cluster.url).query["host"]), "data", "postmaster.pid").read_text().split()[0])


def processor_seconds(roots: Iterable[int]) -> float:
    """What processes and those that they started, and that still live, have computed so far."""
    seconds = 0.0
    for root in map(psutil.Process, roots):
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                seconds += sum(process.cpu_times()[:2])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1 if TINY else 10)
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS))
    parser.add_argument("--batch", type=int, default=2 if TINY else 6)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 1) - 1))
    options = parser.parse_args()
    report = Report("cluster_overhead")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("local", "cluster"):
            (Path(folder) / name).mkdir()
        flags = ("--min-replicas", "1", "--max-replicas", "1")
        with (
            serving(Path(folder) / "local", "--no-page", "--devices", "cpu", threads=options.threads) as local,
            closing(JobStore(JobFiles(Path(folder) / "local"))) as store,
            fleet(Path(folder) / "cluster", {"node": "1x24GiB"}, *flags, cpus=options.threads, fsync="on") as cluster,
        ):
            wait("the replica is ready", cluster.replicas)
            paths = {"local": (local, store), "cluster": (cluster.server, cluster.store)}
            for one in paths.values():
                run_jobs(*one, KINDS["long"], 1)  # loads the models
            parts = {
                "local": [local.process.pid],
                "api and controller": [cluster.server.process.pid],
                "ray and replica": [cluster.ray.pid],
                "postgresql": [postmaster(cluster)],
            }
            roots = {
                "local": parts["local"],
                "cluster": [pid for name in parts if name != "local" for pid in parts[name]],
            }
            idle = {name: processor_seconds(pids) for name, pids in parts.items()}
            time.sleep(IDLE_SECONDS)
            report.add(
                "standing",
                **{
                    f"{name.replace(' ', '_')}_percent_of_a_core": round(
                        100 * (processor_seconds(pids) - idle[name]) / IDLE_SECONDS, 1
                    )
                    for name, pids in parts.items()
                },
            )
            for kind in options.kinds:
                fields = KINDS[kind]
                for section, count in (("latency", 1), ("throughput", options.batch)):
                    found: dict[str, list[Batch]] = {name: [] for name in paths}
                    computed = dict.fromkeys(paths, 0.0)
                    for turn in range(options.rounds):
                        for name in sorted(paths, reverse=bool(turn % 2)):
                            before = processor_seconds(roots[name])
                            found[name].append(run_jobs(*paths[name], fields, count))
                            computed[name] += processor_seconds(roots[name]) - before
                    each = {
                        f"{name}_processor_ms_a_job": round(1e3 * total / count / options.rounds, 1)
                        for name, total in computed.items()
                    }
                    report.add(section, threads=options.threads, jobs=kind, **compare(found), **each)
                    report.write()
    report.print()


def compare(found: dict[str, list[Batch]]) -> dict[str, object]:
    """Medians of seconds a job, the fastest rounds, which other programs disturbed least, and what the cluster adds:
    the median of the differences in each round.
    """
    seconds = {name: [batch.seconds for batch in batches] for name, batches in found.items()}
    beside = {name: [batch.beside for batch in batches] for name, batches in found.items()}
    local = statistics.median(seconds["local"])
    added, uncertain = difference(seconds)
    beside_added, beside_uncertain = difference(beside)
    return {
        "rounds": len(seconds["local"]),
        "local_s": round(local, 4),
        "cluster_s": round(statistics.median(seconds["cluster"]), 4),
        "local_fastest_s": round(min(seconds["local"]), 4),
        "cluster_fastest_s": round(min(seconds["cluster"]), 4),
        "added_ms_a_job": round(1e3 * added, 1),
        "uncertain_ms": round(1e3 * uncertain, 1),
        "added_percent": round(100 * added / local, 2),
        "local_beside_ms": round(1e3 * statistics.median(beside["local"]), 1),
        "cluster_beside_ms": round(1e3 * statistics.median(beside["cluster"]), 1),
        "beside_added_ms": round(1e3 * beside_added, 1),
        "beside_uncertain_ms": round(1e3 * beside_uncertain, 1),
        "beside_added_percent": round(100 * beside_added / local, 2),
    }


def difference(seconds: dict[str, list[float]]) -> tuple[float, float]:
    """The median of what each round took longer on the cluster, and two standard errors of the mean."""
    differences = [cluster - here for here, cluster in zip(seconds["local"], seconds["cluster"], strict=True)]
    spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
    return statistics.median(differences), 2 * spread / len(differences) ** 0.5


if __name__ == "__main__":
    main()
