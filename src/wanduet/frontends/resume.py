"""What an interrupted run has left: its seed, where nobody named one, and the videos that it had finished."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count as count_from
from pathlib import Path
from typing import Any

from wanduet.engine.job import OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.media.codecs import find_codec
from wanduet.media.files import UnreadableFileError, slugify
from wanduet.media.read import read_metadata
from wanduet.request import GenerationRequest
from wanduet.sampling.checkpoint import find_checkpoints


@dataclass(frozen=True, slots=True)
class Begun:
    """A request's videos of an earlier run: where they are, the seed of the first, whether all are there."""

    options: OutputOptions
    seed: int
    complete: bool


def with_seed(request: GenerationRequest, seed: int | None) -> GenerationRequest:
    """The request with a seed; as it is for None."""
    return request if seed is None else request.model_copy(update={"seed": seed})


def seed_of_interrupted(request: GenerationRequest, options: OutputOptions, engine: Engine) -> int | None:
    """The seed that an interrupted run of a request had drawn; None if there was none."""
    resolved = request.resolve(engine.models.spec)
    count = resolved.num_videos_per_prompt
    candidates: list[Mapping[str, Any]] = []
    for index in range(count):
        for path in (options.latents_path(index, count), options.video_path(index, count)):
            with suppress(UnreadableFileError):
                candidates.append(read_metadata(path))
    candidates += [checkpoint.about for checkpoint in find_checkpoints(engine.config.data_folder / "checkpoints")]
    return next((seed for about in candidates if (seed := _seed(about, request, engine)) is not None), None)


def find_begun(
    request: GenerationRequest, folder: OutputOptions, engine: Engine, taken: Sequence[Path] = ()
) -> Begun | None:
    """The videos in a folder that an earlier run has made of this request, under the names that are made up for it."""
    count, slug = request.num_videos_per_prompt, slugify(request.prompt)
    extension = find_codec(folder.codec).extensions[0]
    for number in count_from(1):
        named = replace(folder, path=folder.path / f"{slug}{'' if number == 1 else f'-{number}'}{extension}")
        paths = [named.video_path(index, count) for index in range(count)]
        there = [path for path in paths if path.exists()]
        if not there:
            return None
        seeds = set() if set(paths) & set(taken) else {_seed_in(path, request, engine) for path in there}
        if len(seeds) == 1 and (seed := seeds.pop()) is not None:
            complete = len(there) == count and engine.is_finished(with_seed(request, seed), named)
            return Begun(named, seed, complete)
    return None


def _seed_in(path: Path, request: GenerationRequest, engine: Engine) -> int | None:
    try:
        return _seed(read_metadata(path), request, engine)
    except UnreadableFileError:
        return None


def _seed(about: Mapping[str, Any], request: GenerationRequest, engine: Engine) -> int | None:
    """The seed of the run that a file tells of, if it was one of this request with this model."""
    fields = about.get("request")
    if not isinstance(fields, Mapping) or about.get("model") != engine.models.about:
        return None
    wanted = request.resolve(engine.models.spec).model_dump(exclude={"seed"})
    seed = fields.get("seed")
    if {k: v for k, v in fields.items() if k != "seed"} != wanted or type(seed) is not int:
        return None
    return seed if request.seed in (None, seed) else None
