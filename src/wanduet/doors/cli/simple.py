"""The entry point of `run_wan.py`: `wanduet generate` with defaults for three settings."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cyclopts import CycloptsError

from wanduet.doors.cli.main import app, main
from wanduet.weights.names import BUNDLED

_LENGTH = ("--num-frames", "--seconds")
_SIZE = ("--resolution", "--height", "--width")


def run(prompt: str, num_frames: int, resolution: tuple[int, int]) -> None:
    """Generate a video and exit. `resolution` is (height, width) in pixels."""
    main(arguments(sys.argv[1:], prompt, num_frames, resolution))


def arguments(flags: Sequence[str], prompt: str, num_frames: int, resolution: tuple[int, int]) -> list[str]:
    """Return the arguments of `generate`. The bundled models keep their own length and size unless flags set them."""
    given, bound = list(flags), _bound(flags)
    if bound is not None and not {"prompt", "embeddings"} & bound.keys():
        given.insert(0, f"--prompt={prompt}")
    names = {flag.split("=", 1)[0] for flag in given}
    settings: list[str] = []
    if bound is None or getattr(bound.get("engine"), "model", None) not in BUNDLED:
        if not names.intersection(_LENGTH):
            settings += ["--num-frames", str(num_frames)]
        if not names.intersection(_SIZE):
            settings += ["--height", str(resolution[0]), "--width", str(resolution[1])]
    return ["generate", *settings, *given]


def _bound(flags: Sequence[str]) -> Mapping[str, Any] | None:
    """Return the command's arguments by flag, environment or settings file; None if they are invalid."""
    try:
        _, bound, _ = app.parse_args(["generate", *flags], exit_on_error=False, print_error=False)
    except CycloptsError:
        return None  # the command reports the error when it runs
    return bound.arguments
