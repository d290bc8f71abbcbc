"""A job's progress on stderr, on a terminal only."""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from wanduet.engine.job import Job

LABELS = {"load": "Loading", "encode": "Text encoder", "denoise": "Denoising", "decode": "Decoding"}


def follow(job: Job) -> None:
    """Show a job's progress until it ends. Ctrl-C cancels it and waits until it has stopped."""
    try:
        _show(job)
    except KeyboardInterrupt:
        job.cancel()
        print("Stopping (Ctrl-C again to stop at once) ...", file=sys.stderr)
        for _ in job.events():
            pass


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
