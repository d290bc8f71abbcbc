"""The command line with a look at the clock, for `first_video.py`: python _process_clock.py BEGAN MARKS HIDDEN argument ...

Writes to the file MARKS the seconds since BEGAN (as `time.time()` gave it before this process was started) at which the
modules were there, the job was planned, its first and last step were done, and the video was written. HIDDEN are packages
to be hidden from it, divided by commas.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

seen: dict[str, float] = {}


def mark(name: str) -> None:
    seen.setdefault(name, round(time.time() - float(sys.argv[1]), 2))


def follow(job: Any) -> None:
    """In place of the progress bar."""
    mark("planned")
    for event in job.events():
        if event.phase == "denoise" and event.done:
            mark("first_step")
            if event.done == event.total:
                mark("last_step")


def main() -> None:
    mark("python_runs")
    marks, hidden, arguments = sys.argv[2], sys.argv[3], sys.argv[4:]
    for name in filter(None, hidden.split(",")):
        sys.modules[name] = None  # type: ignore[assignment]  # as if it were not installed

    from wanduet.doors.cli import commands
    from wanduet.doors.cli import main as cli

    mark("imported")
    commands.follow = follow
    try:
        cli.main(arguments)
    finally:
        mark("video")
        Path(marks).write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
