"""The entry point of `run_wan.py`: `wanduet generate` with defaults for three settings."""

import sys
from collections.abc import Sequence

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
    given = list(flags)
    if not _has_prompt(given):
        given.insert(0, f"--prompt={prompt}")
    names = {flag.split("=", 1)[0] for flag in given}
    settings: list[str] = []
    if _model(given) not in BUNDLED:
        if not names.intersection(_LENGTH):
            settings += ["--num-frames", str(num_frames)]
        if not names.intersection(_SIZE):
            settings += ["--height", str(resolution[0]), "--width", str(resolution[1])]
    return ["generate", *settings, *given]


def _has_prompt(given: list[str]) -> bool:
    try:
        _, bound, _ = app.parse_args(["generate", *given], exit_on_error=False, print_error=False)
    except CycloptsError:
        return True  # the command reports the error when it runs
    return bool({"prompt", "embeddings"} & set(bound.arguments))


def _model(given: list[str]) -> str | None:
    """Return the model by flag, environment or settings file; None if the arguments are invalid."""
    try:
        _, bound, _ = app.parse_args(["generate", *given], exit_on_error=False, print_error=False)
    except CycloptsError:
        return None
    engine = bound.arguments.get("engine")
    return getattr(engine, "model", None)
