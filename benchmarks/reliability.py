"""What holds under attack, in figures: names, strange databases, locks, retention, hangs, slow clients, hostile uploads.

    python benchmarks/reliability.py [--only names store worker http]

Needs no GPU. All servers and clients are on this machine. About six minutes with all sections; small where TINY is set.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import _reliability_names
import _reliability_store
import _reliability_worker
from _common import Report
from _reliability_http import figures, serving

SMALL = "TINY" in os.environ


def names(report: Report) -> None:
    report.add("names", **_reliability_names.lost_names(programs=4 if SMALL else 8, rounds=1 if SMALL else 5))


def store(report: Report) -> None:
    out: dict[str, Any] = {}
    _reliability_store.main(out, 2_000 if SMALL else 100_000, 2.0 if SMALL else 60.0)
    for name, row in out.items():
        report.add("store", attack=name, **(row if isinstance(row, dict) else {"value": row}))


def worker(report: Report) -> None:
    for kind, row in _reliability_worker.worker_figures(1 if SMALL else 5).items():
        report.add("worker", hang=kind, **row)


def http(report: Report) -> None:
    for open_files in (1024, 64):
        with tempfile.TemporaryDirectory() as folder, serving(Path(folder), open_files) as server:
            report.add("http", open_files=open_files, **figures(server, 100 if SMALL else 1000))


SECTIONS = {"names": names, "store": store, "worker": worker, "http": http}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(SECTIONS), choices=list(SECTIONS))
    chosen = parser.parse_args().only
    report = Report("reliability")
    report.run(SECTIONS, chosen)
    report.print()


if __name__ == "__main__":
    main()
