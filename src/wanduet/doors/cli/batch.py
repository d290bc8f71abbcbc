"""`wanduet batch`: makes many requests' videos in a folder; after an interruption, only the missing ones."""

import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wanduet.config import EngineConfig
from wanduet.doors.cli.commands import check_attention, report, say_how_to_go_on, shown
from wanduet.doors.cli.embeddings import use_embeddings
from wanduet.doors.cli.outputs import free_output
from wanduet.doors.cli.places import Place
from wanduet.doors.cli.progress import Batch, follow, stoppable_engine
from wanduet.doors.cli.resume import Begun, seed_of_interrupted, take_begun, with_seed
from wanduet.engine.job import Job, OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.errors import CancelledError, WanduetError
from wanduet.family.speeds import forecast
from wanduet.media.files import check_writable
from wanduet.media.names import Taken
from wanduet.planning.plan import require_fit
from wanduet.request import GenerationRequest

# Jobs submitted at a time: enough to fill the engine's stages, few enough for their file locks.
AHEAD = 8


def run_batch(
    requests: Sequence[GenerationRequest],
    config: EngineConfig,
    options: OutputOptions,
    output: Place,
    embeddings: Sequence[Path] = (),
) -> dict[str, Any]:
    """Make the videos of validated requests in the folder `options.path`.

    A request that fails does not stop the others; Ctrl-C does. `options.resume` keeps what an earlier run of the same
    batch has made. `embeddings`: files of embeddings of the requests' prompts.
    """
    check_attention(config)
    done: list[dict[str, Any]] = []
    check_writable(options.path / "video.mp4")
    with ExitStack() as names, stoppable_engine(config) as engine:
        predicted = []
        for request in requests:
            plan = engine.plan(request)
            require_fit(plan, engine.models.resolve(request))
            predicted.append(plan.prediction.seconds.total)
        use_embeddings(embeddings, engine, requests)
        total = Batch(predicted)
        batch = _Batch(engine, options, names, output)
        waiting, work, said = deque(requests), deque[_Work](), ""
        while waiting or work:
            while waiting and len(work) < AHEAD:
                work.append(batch.begin(waiting.popleft()))
            one = work.popleft()
            about = total.place if one.job is None else total.text(time.monotonic())
            print(f"{about}: {one.title}", file=sys.stderr)
            if one.job is not None and (loss := forecast(one.job.plan.as_dict())) not in ("", said):
                print(f"{loss[0].upper()}{loss[1:]}", file=sys.stderr)
                said = loss
            interrupted = False
            if one.job is not None:
                interrupted = follow(one.job, total)
                one.outcome = _outcome(one.job, output)
                one.names.release()
            total.add(one.job is not None, time.monotonic())
            if "error" in one.outcome:
                print(one.outcome["error"], file=sys.stderr)
            cancelled = one.outcome.pop("cancelled", False)
            if not cancelled:
                done.append(one.outcome)
            if interrupted or cancelled:
                raise CancelledError(
                    f"Interrupted: {sum('error' not in o for o in done)} of {len(requests)} videos were made.",
                    hint="Make the others: the same command with --resume.",
                )
    return {"videos": done, "failed": sum("error" in one for one in done)}


@dataclass
class _Work:
    """One request of a batch: its job, or its outcome if there is no job."""

    title: str
    job: Job | None = None
    names: Taken = field(default_factory=Taken)
    outcome: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Batch:
    """State that the requests of a batch share.

    `names` is released after the engine has stopped, so that no name is free while a job may write to it.
    """

    engine: Engine
    options: OutputOptions
    names: ExitStack
    output: Place
    passed: list[Path] = field(default_factory=list)  # output paths of the requests so far

    def begin(self, request: GenerationRequest) -> _Work:
        """Choose and lock a request's names, and submit it; an error (its input video is gone, for example) fails only
        this request."""
        work = _Work(shown(request.prompt))
        count = request.num_videos_per_prompt
        try:
            begun = take_begun(request, self.options, self.engine, self.passed) if self.options.resume else None
            if begun is not None:
                named, work.names = begun.options, begun.names
            else:
                named, work.names = free_output(self.options, request.prompt, count, self.passed)
            self.names.callback(work.names.release)
            self.passed += [named.video_path(index, count) for index in range(count)]
            if begun is not None and begun.complete:
                work.outcome = _made_before(request, begun, self.engine, self.output)
                work.title = f"made before: {work.outcome['output']}"
                work.names.release()
                return work
            if begun is not None:
                request = with_seed(request, begun.seed)
            elif self.options.resume and request.seed is None:
                request = with_seed(request, seed_of_interrupted(request, named, self.engine))
            work.job = self.engine.submit(request, replace(named, taken=True))
        except CancelledError:
            raise
        except WanduetError as error:
            work.names.release()
            work.outcome = {"prompt": request.prompt, "error": str(error)}
        return work


def _outcome(job: Job, output: Place) -> dict[str, Any]:
    """Return a finished job's result, or its error."""
    try:
        return report(job, job.result(), output)
    except CancelledError:
        return {"cancelled": True}
    except Exception as error:  # reported; the next job continues
        if isinstance(error, WanduetError):
            say_how_to_go_on(job, error)
        return {"prompt": job.request.prompt, "error": str(error)}


def _made_before(request: GenerationRequest, begun: Begun, engine: Engine, output: Place) -> dict[str, Any]:
    """Return the result of a request whose videos an earlier run has made."""
    resolved = engine.models.resolve(request)
    paths = [
        begun.options.video_path(index, resolved.num_videos_per_prompt)
        for index in range(resolved.num_videos_per_prompt)
    ]
    videos = [{"output": output.shown(path), "seed": begun.seed + index} for index, path in enumerate(paths)]
    fields = {name: getattr(resolved, name) for name in ("width", "height", "num_frames", "fps")}
    return {"output": videos[0]["output"], "seed": begun.seed, **fields, "videos": videos, "made_before": True}
