"""Where a command's videos go: a name that the user gave, or the first free one that the prompt makes up.

Either is taken for as long as the command works, so that two commands at the same time never write one file.
"""

import os
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

from wanduet.engine.job import OutputOptions
from wanduet.media.codecs import find_codec
from wanduet.media.names import Taken, names_for, take, take_given


def take_output(options: OutputOptions, count: int) -> Taken:
    """The names of `count` videos that go where the user said. Raises OutputError where another run writes them."""
    return take_given(options.video_path(index, count) for index in range(count))


def free_output(
    options: OutputOptions, prompt: str, count: int = 1, taken: Collection[Path] = (), *, over_latents: bool = False
) -> tuple[OutputOptions, Taken]:
    """The first free name in the folder `options.path` for a prompt's `count` videos, taken.

    Names are skipped that exist, that are in `taken`, that another run has, or beside which an interrupted run left
    its latents; with `over_latents` these last are used. Raises OutputError.
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
        if not _any_exists(watched):  # else its owner has finished in between
            return named, names
        names.release()
    raise AssertionError("names_for never ends")


def likely_output(options: OutputOptions, prompt: str, count: int) -> OutputOptions:
    """What `free_output` would give now; nothing is taken or made."""
    for path in names_for(options.path, prompt, _extension(options)):
        named = replace(options, path=path)
        if not _any_exists([path, *(named.video_path(index, count) for index in range(count))]):
            return named
    raise AssertionError("names_for never ends")


def free_file(folder: Path, prompt: str, extension: str) -> tuple[Path, Taken]:
    """The first free name for one file, taken. Raises OutputError."""
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
