"""The cluster's scheduler, autoscaler, controller and store, as they are, against a fleet and a clock that are not.

    PYTHONPATH=src python benchmarks/cluster_sim.py [--replicas 1,10,100,1000] [section ...]

Sections: `fleet` simulates hours of a mixed fleet (2x24 GiB and 8x80 GiB machines) under bursts, one key that floods
the queue, nodes that fail, and workers that wake up after their job was given away. Only the making of videos, the
network and the clock are simulated: claims, leases, fences, completions, recoveries and the controller's turns are the
program's own, on SQLite in memory. `database` measures on a real PostgreSQL what one claim and one look cost, with
claimers at the same time and queues of several lengths. `limits` puts both together: what gives way first, and when.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import sqlalchemy as sa
import structlog
from _cluster_fleet import MODEL, Simulation
from _common import TINY, Report

from wanduet.cluster.fit import Fit, Fitter
from wanduet.cluster.settings import REPLICA_CONNECTIONS
from wanduet.cluster.store import ClusterStore
from wanduet.config import EngineConfig
from wanduet.jobs.files import JobFiles
from wanduet.jobs.logs import configure_logs
from wanduet.jobs.records import NewJob, demand_of
from wanduet.jobs.schema import jobs
from wanduet.runtime.models import Models

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "cluster"))


def simulate(report: Report, options: argparse.Namespace) -> None:
    fitter = Fitter(Models(EngineConfig(model=MODEL)).memory, EngineConfig(model=MODEL))
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    for size in options.replicas:
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            simulation = Simulation(size, max(200, options.jobs * size) if not TINY else 30, Path(folder), fitter)
            with closing(simulation.store):
                report.add("fleet", **simulation.run())


def database(report: Report, options: argparse.Namespace) -> None:
    """Claims a second on PostgreSQL as installed (each commit on the disk), and what a look at the queue costs."""
    from postgres import postgres

    small = [100] if TINY else [100, 1000, 10000]
    for queue in small:
        for claimers in (1, 8):
            with postgres(fsync="on") as url, tempfile.TemporaryDirectory() as folder:
                store = ClusterStore(JobFiles(Path(folder)), url, fit_of=lambda demand: Fit(True, 10.0))
                fill(store, queue)
                looks = timed_loop(lambda store=store: store.waiting(), 0.5)
                claimed = claim_together(url, Path(folder), claimers, 1.0 if TINY else 4.0)
                lease = store.claim("w", 30.0)
                checks = timed_loop(lambda store=store, lease=lease: store.check(lease), 0.5)
                store.close()
            report.add(
                "database", queued=queue, claimers=claimers, claims_a_second=round(claimed),
                looks_at_the_queue_a_second=round(looks), lease_checks_a_second=round(checks),
            )  # fmt: skip


def fill(store: ClusterStore, count: int) -> None:
    sizes = [(480, 832), (720, 1280), (1080, 1920)]
    first = store.submit(NewJob("owner0", MODEL, {"prompt": "x", "height": 480, "width": 832})).job
    moment = int(first.id[6:18], 16)
    rows = []
    for index in range(count):
        height, width = sizes[index % 3]
        request = {"prompt": "x" * 200, "height": height, "width": width, "num_frames": 81}
        rows.append(
            {
                "id": f"video_{moment - index - 1:012x}{index:020x}",
                "owner": f"owner{index % 10}",
                "fingerprint": "-",
                "model": MODEL,
                "request": request,
                "demand": demand_of(request),
                "priority": 0,
                "status": "queued",
                "created_at": time.time(),
                "files": [],
                "report": {},
            }
        )
    with store.database.begin() as connection:
        connection.execute(sa.insert(jobs), rows)
    with store.database.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("VACUUM ANALYZE jobs"))


def claim_together(url: str, folder: Path, claimers: int, seconds: float) -> float:
    counts = [0] * claimers
    barrier = threading.Barrier(claimers)

    def work(index: int) -> None:
        with closing(ClusterStore(JobFiles(folder), url, fit_of=lambda demand: Fit(True, 10.0))) as store:
            store.waiting()
            barrier.wait()
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                lease = store.claim(f"w{index}", 30.0)
                if lease is None:
                    continue
                store.release(lease)  # back, so that the queue stays as long as it is
                counts[index] += 1

    threads = [threading.Thread(target=work, args=(index,)) for index in range(claimers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


def timed_loop(call: Callable[[], object], seconds: float) -> float:
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        call()
        count += 1
    return count / (time.perf_counter() - began)


def limits(report: Report, options: argparse.Namespace) -> None:
    """How many replicas each part could carry, from the figures above, the smallest first."""
    found = report.sections.get("database", [])
    fleet = report.sections.get("fleet", [])
    if not found or not fleet:
        return
    worst = max(found, key=lambda row: (row["queued"], row["claimers"]))
    checks = min(row["lease_checks_a_second"] for row in found)
    largest = fleet[-1]
    seconds = 60.0  # a short job; longer ones load the database less
    slowest_poll = 30.0 / 8
    rows = {
        "PostgreSQL's connections at its default of 100, without a pooler": (100 - 3 - 20) // REPLICA_CONNECTIONS,
        "lease checks, at the rarest polls that a lease of 30 s allows": round(checks * slowest_poll / 2),
        "claims, each replica taking a job of 60 s after the other": round(worst["claims_a_second"] * seconds),
        "one turn of the controller within its second": round(
            largest["replicas"] * 1000 / largest["controller_turn_ms_p50"]
        ),
    }
    for what, replicas in sorted(rows.items(), key=lambda row: row[1]):
        report.add("limits", bottleneck=what, replicas=replicas)


SECTIONS = {"fleet": simulate, "database": database, "limits": limits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=[*SECTIONS])
    parser.add_argument("--replicas", type=lambda text: [int(n) for n in text.split(",")], default=None)
    parser.add_argument("--jobs", type=int, default=6, help="jobs for each replica, 200 at least")
    options = parser.parse_args()
    options.replicas = options.replicas or ([1, 4] if TINY else [1, 10, 100, 1000])
    configure_logs()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    report = Report("cluster_sim")
    runs = {section: lambda report, run=run: run(report, options) for section, run in SECTIONS.items()}
    report.run(runs, options.sections)
    report.print()


if __name__ == "__main__":
    main()
