"""Tables and values as the command line prints them for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from wanduet.config import format_bytes
from wanduet.untrusted import printable


def rows(console: Console, lines: Sequence[Sequence[str]], *heads: str) -> None:
    """Print lines of cells below each other, the last column wrapped; nothing without lines."""
    if lines:
        table = Table(
            *(Column(head, overflow="fold") for head in heads or [""] * max(map(len, lines))),
            box=None, pad_edge=False, show_header=bool(heads), header_style="bold",
        )  # fmt: skip
        for line in lines:
            table.add_row(*line)
        console.print(table)


def fields(console: Console, value: Mapping[str, Any], hidden: Sequence[str] = ()) -> None:
    """Print what is set in a mapping as a table of names and values."""
    lines = [(name, text(name, field)) for name, field in value.items() if name not in hidden and is_set(field)]
    if lines:
        table = Table(*(Column(overflow="fold") for _ in range(2)), show_header=False)
        for line in lines:
            table.add_row(*line)
        console.print(table)


def is_set(field: Any) -> bool:
    """Return whether a value says anything."""
    return field not in (None, [], {}, "")


def text(name: str, field: Any) -> str:
    """Return a value for people; `name` ends in "bytes" if it is a size."""
    if isinstance(field, Mapping):
        unit = name if name.endswith("bytes") else ""  # the unit of everything in it
        return "\n".join(f"{k}: {text(unit or k, v)}" for k, v in field.items() if is_set(v))
    if isinstance(field, list):
        if field and all(isinstance(item, int) for item in field):
            return " x ".join(map(str, field))  # a shape
        return "\n".join(text(name, item) for item in field)
    if isinstance(field, bool):
        return "yes" if field else "no"
    if isinstance(field, int):
        return format_bytes(field) if name.endswith("bytes") else str(field)
    return f"{field:.4g}" if isinstance(field, float) else printable(str(field))


def length(settings: Mapping[str, Any]) -> str:
    """Return size, length and steps of a video: `832x480, 81 frames (5.1 s), 50 steps`."""
    frames, steps = settings["num_frames"], settings["num_inference_steps"]
    seconds = f"({frames / settings['fps']:.1f} s)"
    size = f"{settings['width']}x{settings['height']}"
    return f"{size}, {frames} frame{'s' * (frames != 1)} {seconds}, {steps} step{'s' * (steps != 1)}"
