"""How soon a worker that hangs is found, and how soon its job goes on, around an engine that only counts steps.

    PYTHONPATH=src python benchmarks/_reliability_worker.py [TRIES]

`stop`: the process is stopped by SIGSTOP at a random moment, with the settings that a server has unless told otherwise.
`stick`: one thread never comes back, as in a driver that never answers, while the lease is kept; found after
`STUCK_SECONDS` without a step here, where a server waits ten minutes or five steps.
"""

import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "faults"))

from job_workers import ENVIRONMENT, journal, open_store, submit, supervised

from wanduet.jobs.watchdog import HangSettings

STUCK_SECONDS = 5.0
STEPS = 1000  # of STEP_SECONDS each: the job outlasts all attacks on it
STEP_SECONDS = 0.2


def hang_figures(kind: str, tries: int, seed: int = 0) -> dict[str, Any]:
    """Hang a worker so often, one after the other. Seconds are counted from the hang, or from the last step before it.

    `kind` is `stop` or `stick`. Returns the tries, how many were found, the median and longest seconds until one was found
    and until the next step of the same job, and steps that were done twice.
    """
    ENVIRONMENT["FAKE_STEP_SECONDS"] = str(STEP_SECONDS)
    dice = random.Random(seed)
    hangs = HangSettings() if kind == "stop" else HangSettings(step_seconds=STUCK_SECONDS, phase_seconds=STUCK_SECONDS)
    found: list[float] = []
    went_on: list[float] = []
    redone = 0
    for number in range(tries) if kind == "stick" else [0]:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder)
            store = open_store(data)
            process = supervised(data, hangs=hangs)
            job = submit(store, f"stick {dice.randint(5, 15)}" if kind == "stick" else "job 0", STEPS, number)
            process.start()
            try:
                for _ in range(tries if kind == "stop" else 1):
                    before = process.hangs
                    if kind == "stop":
                        known = len(journal(data))
                        _wait(lambda known=known: len(journal(data)) > known)
                        time.sleep(dice.uniform(0.0, 0.5))
                        pid = process.pid
                        assert pid is not None
                        os.kill(pid, signal.SIGSTOP)
                    else:
                        _wait(lambda job=job: f"{job} stick" in journal(data))
                    began, known = time.monotonic(), len(journal(data))
                    _wait(lambda before=before: process.hangs > before)
                    found.append(time.monotonic() - began)
                    _wait(lambda known=known: len(journal(data)) > known)
                    went_on.append(time.monotonic() - began)
            finally:
                process.kill()
                process.stop(1.0)
            steps = [line for line in journal(data) if f"{job} step" in line]
            redone += len(steps) - len(set(steps))
            store.close()
    return {
        "hangs tried": tries,
        "found": len(found),
        "seconds until found": _summary(found),
        "seconds until the job went on": _summary(went_on),
        "steps done twice": redone,
    }


def worker_figures(tries: int = 5) -> dict[str, Any]:
    """Both kinds."""
    return {kind: hang_figures(kind, tries) for kind in ("stop", "stick")}


def _summary(seconds: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(seconds), 2), "max": round(max(seconds), 2)} if seconds else {}


def _wait(condition: Callable[[], bool], seconds: float = 900.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it was not found in time")
        time.sleep(0.02)


if __name__ == "__main__":
    print(json.dumps(worker_figures(int(sys.argv[1]) if len(sys.argv) > 1 else 5), indent=2))
