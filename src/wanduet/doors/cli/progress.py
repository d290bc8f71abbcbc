"""Shows a job's progress on stderr, if it is a terminal."""

import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from wanduet.config import EngineConfig, format_seconds
from wanduet.engine.job import Job
from wanduet.engine.pipeline import Engine

POLL_SECONDS = 0.05
BAR = 24  # columns
LATEST = 8  # what the pace is the mean of: the first steps take longer, and leave it
AT_ONCE = 0.02  # seconds
UNITS = {"denoise": "step", "decode": "frame"}  # of phases whose pace is shown
LABELS = {
    "verify": "Checking MiB",
    "load": "Loading",
    "encode": "Text encoder",
    "encode_video": "Input video",
    "denoise": "Denoising",
    "decode": "Decoding",
}


class Pace:
    """How fast a phase goes, and how long it still takes; times are in seconds of any clock."""

    def __init__(self, unit: str | None) -> None:
        """`unit`: what is counted; None shows only the time left."""
        self._unit, self._marks = unit, deque[tuple[float, int]](maxlen=LATEST + 1)

    def mark(self, done: int, now: float) -> None:
        """Note that so many are done now. Marks at once are events that have waited, and say nothing about the pace."""
        if self._marks and now - self._marks[-1][0] < AT_ONCE:
            self._marks[-1] = (self._marks[-1][0], done)
        elif not self._marks or done > self._marks[-1][1]:
            self._marks.append((now, done))

    def text(self, total: int, now: float) -> str:
        """Return `11.2 s a step, 6.3 min left`, at the end without what is left; "" until two marks are known."""
        if len(self._marks) < 2:
            return ""
        (began, before), (last, done) = self._marks[0], self._marks[-1]
        each = (last - began) / (done - before)
        left = max(0.0, each * (total - done) - (now - last))
        pace = f"{each:.3g} s a {self._unit}" if each >= 1 else f"{1 / max(each, 1e-9):.3g} {self._unit}s a second"
        parts = [pace] * (self._unit is not None) + [f"{format_seconds(left)} left"] * (done < total)
        return ", ".join(parts)


@dataclass
class Batch:
    """The time that a batch of jobs takes: what their plans predict, times how much longer those made so far took."""

    predicted: Sequence[float]  # seconds of each job
    began: float = field(default_factory=time.monotonic)
    made: float = 0.0  # predicted seconds of the jobs that are made
    number: int = 0  # jobs that are over
    over_at: float | None = None  # when the last of them was

    def add(self, was_made: bool, now: float) -> None:
        """Note that a job is over: made, or skipped, which takes no time."""
        self.made += self.predicted[self.number] * was_made
        self.number, self.over_at = self.number + 1, now

    def left(self, now: float) -> float:
        """Return the seconds until all jobs are over."""
        planned = sum(self.predicted[self.number :])
        since = self.began if self.over_at is None else self.over_at
        slower = (since - self.began) / self.made if self.made else 1.0
        return max(0.0, planned * slower - (now - since))

    @property
    def place(self) -> str:
        """`Video 3 of 10`."""
        return f"Video {self.number + 1} of {len(self.predicted)}"

    def text(self, now: float) -> str:
        """Return `Video 3 of 10, 25 min left for all`."""
        return f"{self.place}, {format_seconds(self.left(now))} left for all"


class _Pace(ProgressColumn):
    """Shows a task's pace, and in its last row how a batch goes."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """Return the text of now."""
        batch, pace = task.fields.get("batch"), task.fields.get("pace")
        if batch is not None:
            return Text(batch.text(time.monotonic()))
        return Text("" if pace is None else pace.text(int(task.total or 0), time.monotonic()))


@contextmanager
def stoppable_engine(config: EngineConfig) -> Iterator[Engine]:
    """Yield an engine whose jobs a stop signal cancels at any time, also before `follow` shows them."""
    with Engine(config) as engine:
        try:
            yield engine
        except KeyboardInterrupt:
            _say_stopping()
            raise


def follow(job: Job, batch: Batch | None = None) -> bool:
    """Show a job's progress until it ends; on Ctrl-C or another stop signal, cancel it and wait until it ends.

    `batch` shows how far the batch is that the job belongs to. Returns whether a signal came; the job may have finished or failed all the same.
    """
    try:
        _show(job, batch)
    except KeyboardInterrupt:
        job.cancel()
        _say_stopping()
        while not job.finished:  # its last event may have been read already
            time.sleep(POLL_SECONDS)
        return True
    return False


def _say_stopping() -> None:
    with suppress(OSError, ValueError):
        print("Stopping (Ctrl-C again to stop at once) ...", file=sys.stderr)


def _show(job: Job, batch: Batch | None) -> None:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<13}"), BarColumn(BAR), MofNCompleteColumn(), _Pace())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=False) as progress:
        tasks: dict[tuple[str, int], TaskID] = {}
        paces: dict[TaskID, Pace] = {}
        if batch is not None:
            whole = progress.add_task("All videos", total=len(batch.predicted), completed=batch.number, batch=batch)
        for event in job.events():
            if event.phase not in LABELS:
                continue
            key = (event.phase, event.video)
            if key not in tasks:
                number = f" {event.video + 1}" if job.request.num_videos_per_prompt > 1 else ""
                pace = Pace(UNITS.get(event.phase))
                tasks[key] = progress.add_task(LABELS[event.phase] + number, total=event.total, pace=pace)
                paces[tasks[key]] = pace
            paces[tasks[key]].mark(event.done, time.monotonic())
            progress.update(tasks[key], completed=event.done, total=event.total)
        if batch is not None:
            progress.remove_task(whole)  # the next video shows it
