"""`wanduet batch`: many requests to videos in a folder, and only what is still missing after an interruption."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from wanduet.config import EngineConfig
from wanduet.engine.job import Job, OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.errors import CancelledError
from wanduet.frontends.commands import check_attention, named_output, report, shown, with_seed_of_interrupted
from wanduet.frontends.progress import follow
from wanduet.media.files import UnreadableFileError, slugify
from wanduet.media.read import read_metadata
from wanduet.request import GenerationRequest, ResolvedRequest


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
            made = _made_before(request, options, engine, taken) if options.resume else None
            if made is not None:
                taken += [Path(video["output"]) for video in made["videos"]]
                work.append(made)
                continue
            named = named_output(options, request.prompt, count, taken)
            taken += [named.video_path(index, count) for index in range(count)]
            if options.resume and request.seed is None:
                request = with_seed_of_interrupted(request, named, engine) or request
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


def _made_before(
    request: GenerationRequest, options: OutputOptions, engine: Engine, taken: Sequence[Path]
) -> dict[str, Any] | None:
    """What a request's videos say of themselves, if an earlier run has made all of them."""
    resolved = request.resolve(engine.models.spec)
    count, extension = resolved.num_videos_per_prompt, named_output(options, request.prompt).path.suffix
    number, slug = 1, slugify(request.prompt)
    while True:
        path = options.path / f"{slug}{'' if number == 1 else f'-{number}'}{extension}"
        paths = [replace(options, path=path).video_path(index, count) for index in range(count)]
        if not any(path.exists() for path in paths):
            return None
        seed = None if set(paths) & set(taken) else _seed_of(paths, resolved, request.seed, engine)
        if seed is not None:
            fields = ("width", "height", "num_frames", "fps")
            videos = [{"output": str(path), "seed": seed + index} for index, path in enumerate(paths)]
            return {
                "output": videos[0]["output"],
                "seed": seed,
                **{name: getattr(resolved, name) for name in fields},
                "videos": videos,
                "made_before": True,
            }
        number += 1


def _seed_of(paths: Sequence[Path], wanted: ResolvedRequest, seed: int | None, engine: Engine) -> int | None:
    """The seed of videos that a request has made; None if they are others', or one is missing."""
    fields = wanted.model_dump(exclude={"seed"})
    for index, path in enumerate(paths):
        try:
            about = read_metadata(path)
        except UnreadableFileError:
            return None
        request, own = about.get("request"), about.get("seed")
        if not isinstance(request, dict) or type(own) is not int or about.get("model") != engine.models.about:
            return None
        if {k: v for k, v in request.items() if k != "seed"} != fields or seed not in (None, own - index):
            return None
        seed = own - index
    return seed
