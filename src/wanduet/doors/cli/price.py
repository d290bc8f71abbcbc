"""`wanduet price`: measures what the named speeds and each accelerator cost on this machine."""

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from wanduet.config import EngineConfig, format_seconds
from wanduet.doors.cli.commands import check_attention
from wanduet.price.compare import missing
from wanduet.price.measure import Measurement
from wanduet.price.report import report
from wanduet.request import GenerationRequest


def run_price(request: GenerationRequest, config: EngineConfig, prompts: int) -> dict[str, Any]:
    """Measure what is not measured yet, and return all rows. Says before how long it will take, on stderr.

    Raises InvalidRequestError, ConfigError if another measurement is running, and the errors of jobs.
    """
    check_attention(config)
    with Measurement(config, request, prompts) as measurement:
        for name, allowed in measurement.refused.items():
            print(f"Left out: {name} ({allowed}).", file=sys.stderr)
        for sentence in missing():
            print(sentence, file=sys.stderr)
        _announce(measurement)
        console = Console(stderr=True)
        columns = (TextColumn("{task.description:<40}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("Loading", total=None)

            def show(what: str, done: float, total: float) -> None:
                bar.update(task, description=what, completed=done, total=total)

            measurement.run(show)
        return report(measurement)


def _announce(measurement: Measurement) -> None:
    videos, r = measurement.videos_left, measurement.request
    numbers = {"frame": r.num_frames, "step": r.num_inference_steps}
    size = ", ".join([f"{r.width}x{r.height}", *(f"{n} {name}{'s' * (n > 1)}" for name, n in numbers.items())])
    if not videos:
        print(f"{size}: all is measured.", file=sys.stderr)
        return
    seconds = format_seconds(measurement.seconds_left)
    print(
        f"{size}: {videos} video{'s' * (videos > 1)} to make, about {seconds} once the model is loaded and, the first time on "
        "a GPU, kernels are compiled, which takes a minute or two.",
        file=sys.stderr,
    )
    print("Ctrl-C stops it; the same command goes on where it stopped.", file=sys.stderr)
