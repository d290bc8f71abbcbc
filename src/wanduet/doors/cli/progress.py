"""Shows a job's progress on stderr, if it is a terminal."""

import sys
import time
from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from wanduet.engine.job import Job

POLL_SECONDS = 0.05
LABELS = {
    "verify": "Checking MiB",
    "load": "Loading",
    "encode": "Text encoder",
    "encode_video": "Input video",
    "denoise": "Denoising",
    "decode": "Decoding",
}


def follow(job: Job) -> bool:
    """Show a job's progress until it ends; on Ctrl-C or another stop signal, cancel it and wait until it ends.

    Returns whether a signal came; the job may have finished or failed all the same.
    """
    try:
        _show(job)
    except KeyboardInterrupt:
        job.cancel()
        with suppress(OSError, ValueError):
            print("Stopping (Ctrl-C again to stop at once) ...", file=sys.stderr)
        while not job.finished:  # its last event may have been read already
            time.sleep(POLL_SECONDS)
        return True
    return False


def _show(job: Job) -> None:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<13}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=False) as progress:
        tasks: dict[tuple[str, int], TaskID] = {}
        for event in job.events():
            if event.phase not in LABELS:
                continue
            key = (event.phase, event.video)
            if key not in tasks:
                number = f" {event.video + 1}" if job.request.num_videos_per_prompt > 1 else ""
                tasks[key] = progress.add_task(LABELS[event.phase] + number, total=event.total)
            progress.update(tasks[key], completed=event.done, total=event.total)
