"""Names of a command's videos: a name that the user gave, or the first free one derived from the prompt.

The names are locked while the command works, so that two commands at the same time never write one file.
"""

import os
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

from wanduet.engine.job import OutputOptions
from wanduet.media.codecs import find_codec
from wanduet.media.names import Taken, names_for, take, take_given


def take_output(options: OutputOptions, count: int) -> Taken:
    """Lock the names of `count` videos at the user's path. Raises OutputError if another run is writing them."""
    return take_given(options.video_path(index, count) for index in range(count))


def free_output(
    options: OutputOptions, prompt: str, count: int = 1, taken: Collection[Path] = (), *, over_latents: bool = False
) -> tuple[OutputOptions, Taken]:
    """Lock the first free name in the folder `options.path` for a prompt's `count` videos.

    Skips names that exist, that are in `taken`, that another run has locked, or that have latents of an interrupted
    run; `over_latents` allows these last. Raises OutputError.
    """
    for path in names_for(options.path, prompt, _extension(options)):
        named = replace(options, path=path)
        videos = [named.video_path(index, count) for index in range(count)]
        watched = [path, *videos]
        if not over_latents:
            watched += [named.latents_path(index, count) for index in range(count)]
        if _any_exists(watched) or set(videos) & set(taken):
            continue
        names = take(videos)
        if names is None:
            continue
        if not _any_exists(watched):  # else another run has finished it since
            return named, names
        names.release()
    raise AssertionError("names_for never ends")


def likely_output(options: OutputOptions, prompt: str, count: int) -> OutputOptions:
    """Return what `free_output` would return now, without locking or creating anything."""
    for path in names_for(options.path, prompt, _extension(options)):
        named = replace(options, path=path)
        if not _any_exists([path, *(named.video_path(index, count) for index in range(count))]):
            return named
    raise AssertionError("names_for never ends")


def free_file(folder: Path, prompt: str, extension: str) -> tuple[Path, Taken]:
    """Lock the first free name for one file. Raises OutputError."""
    for path in names_for(folder, prompt, extension):
        if os.path.lexists(path) or (names := take([path])) is None:
            continue
        if not os.path.lexists(path):
            return path, names
        names.release()
    raise AssertionError("names_for never ends")


def _extension(options: OutputOptions) -> str:
    return find_codec(options.codec).extensions[0]


def _any_exists(paths: Iterable[Path]) -> bool:
    return any(os.path.lexists(path) for path in paths)
