"""`wanduet batch`: many requests to videos in a folder, and only what is still missing after an interruption."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wanduet.config import EngineConfig
from wanduet.engine.job import Job, OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.errors import CancelledError
from wanduet.frontends.commands import check_attention, named_output, report, shown
from wanduet.frontends.progress import follow
from wanduet.frontends.resume import Begun, find_begun, seed_of_interrupted, with_seed
from wanduet.request import GenerationRequest


def run_batch(requests: Sequence[GenerationRequest], config: EngineConfig, options: OutputOptions) -> dict[str, Any]:
    """Requests, checked already, to videos in the folder `options.path`. One that fails does not stop the others;
    Ctrl-C does. With `options.resume` what an earlier run of the same batch has made is kept as it is."""
    check_attention(config)
    done: list[dict[str, Any]] = []
    with Engine(config) as engine:
        work: list[Job | dict[str, Any]] = []
        taken: list[Path] = []
        for request in requests:
            count = request.num_videos_per_prompt
            found = find_begun(request, options, engine, taken) if options.resume else None
            named = found.options if found is not None else named_output(options, request.prompt, count, taken)
            taken += [named.video_path(index, count) for index in range(count)]
            if found is not None and found.complete:
                work.append(_made_before(request, found, engine))
                continue
            if found is not None:
                request = with_seed(request, found.seed)
            elif options.resume and request.seed is None:
                request = with_seed(request, seed_of_interrupted(request, named, engine))
            work.append(engine.submit(request, named))
        for number, job in enumerate(work, start=1):
            if not isinstance(job, Job):
                print(f"[{number}/{len(work)}] made before: {job['output']}", file=sys.stderr)
                done.append(job)
                continue
            print(f"[{number}/{len(work)}] {shown(job.request.prompt)}", file=sys.stderr)
            follow(job)
            try:
                done.append(report(job, job.result()))
            except CancelledError as error:
                raise CancelledError(
                    f"Interrupted: {len(done)} of {len(work)} videos were made.",
                    hint="Make the others: the same command with --resume.",
                ) from error
            except Exception as error:  # told below; the next job goes on
                print(error, file=sys.stderr)
                done.append({"prompt": job.request.prompt, "error": str(error)})
    return {"videos": done, "failed": sum("error" in one for one in done)}


def _made_before(request: GenerationRequest, found: Begun, engine: Engine) -> dict[str, Any]:
    """What is told of videos that an earlier run has made."""
    resolved = request.resolve(engine.models.spec)
    paths = [
        found.options.video_path(index, resolved.num_videos_per_prompt)
        for index in range(resolved.num_videos_per_prompt)
    ]
    videos = [{"output": str(path), "seed": found.seed + index} for index, path in enumerate(paths)]
    fields = {name: getattr(resolved, name) for name in ("width", "height", "num_frames", "fps")}
    return {"output": videos[0]["output"], "seed": found.seed, **fields, "videos": videos, "made_before": True}
