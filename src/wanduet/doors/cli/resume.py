"""Finds what an interrupted run has left: its seed (if the request has none), finished videos, and latents."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wanduet.engine.job import OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.media.codecs import find_codec
from wanduet.media.files import UnreadableFileError
from wanduet.media.names import Taken, is_taken, names_for, take
from wanduet.media.read import read_metadata
from wanduet.request import GenerationRequest
from wanduet.sampling.checkpoint import find_checkpoints


@dataclass(frozen=True, slots=True)
class Begun:
    """An earlier run's videos of a request: their paths, the first one's seed, and whether all exist.

    `names` are locked; the caller releases them.
    """

    options: OutputOptions
    seed: int
    complete: bool
    names: Taken


def with_seed(request: GenerationRequest, seed: int | None) -> GenerationRequest:
    """Return the request with a seed, unless it is None."""
    return request if seed is None else request.model_copy(update={"seed": seed})


def seed_of_interrupted(request: GenerationRequest, options: OutputOptions, engine: Engine) -> int | None:
    """Return the seed that an interrupted run of a request drew; None if there is no such run."""
    wanted = _wanted(request, engine)
    count = request.num_videos_per_prompt
    candidates: list[Mapping[str, Any]] = []
    for index in range(count):
        for path in (options.latents_path(index, count), options.video_path(index, count)):
            with suppress(UnreadableFileError):
                candidates.append(read_metadata(path))
    candidates += [checkpoint.about for checkpoint in find_checkpoints(engine.config.data_folder / "checkpoints")]
    return next((seed for about in candidates if (seed := wanted.seed_in(about)) is not None), None)


def take_begun(
    request: GenerationRequest, folder: OutputOptions, engine: Engine, passed: Sequence[Path] = ()
) -> Begun | None:
    """Find and lock what an earlier run has made of this request in a folder: videos, or latents not yet decoded.

    It looks under the names derived from the prompt, and skips names in `passed` or locked by another run.
    """
    wanted = _wanted(request, engine)
    count = request.num_videos_per_prompt
    for path in names_for(folder.path, request.prompt, find_codec(folder.codec).extensions[0]):
        named = replace(folder, path=path)
        videos = [named.video_path(index, count) for index in range(count)]
        there = [video for video in videos if video.exists()]
        latents = [kept for index in range(count) if (kept := named.latents_path(index, count)).exists()]
        if not there and not latents:
            if any(is_taken(video) for video in videos):
                continue
            return None
        if set(videos) & set(passed):
            continue
        seeds = {wanted.seed_of(file) for file in there or latents}
        seed = seeds.pop() if len(seeds) == 1 else None
        if seed is not None and (names := take(videos)) is not None:
            complete = len(there) == count and engine.is_finished(with_seed(request, seed), named)
            return Begun(named, seed, complete, names)
    return None


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A request, resolved once: that reads its whole input video."""

    fields: Mapping[str, Any]  # as in a video's metadata; the seed is not compared
    seed: int | None  # the one that the user gave
    model: Mapping[str, Any]

    def seed_in(self, about: Mapping[str, Any]) -> int | None:
        """Return the seed in a file's metadata if it is of this request and this model; else None."""
        fields = about.get("request")
        if not isinstance(fields, Mapping) or about.get("model") != self.model:
            return None
        seed = fields.get("seed")
        if dict(fields) | {"seed": None} != self.fields or type(seed) is not int:
            return None
        return seed if self.seed in (None, seed) else None

    def seed_of(self, path: Path) -> int | None:
        """Return the seed of a file, see `seed_in`."""
        try:
            return self.seed_in(read_metadata(path))
        except UnreadableFileError:
            return None


def _wanted(request: GenerationRequest, engine: Engine) -> _Wanted:
    fields = engine.models.resolve(request).recorded() | {"seed": None}
    return _Wanted(fields, request.seed, engine.models.about)
