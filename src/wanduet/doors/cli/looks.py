"""Prints for people what `bench` has measured and what `inspect` has seen in a file."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from wanduet.config import format_bytes, format_seconds
from wanduet.doors.cli.tables import fields, length, rows, text
from wanduet.untrusted import printable

# What is said in sentences, or is of no use to people.
IN_SENTENCES = (
    "kind", "made_by", "channel_means", "channel_stds", "width", "height", "fps", "num_frames", "duration_s", "codec",
    "num_bytes", "text", "cut", "problem", "hint", "runs", "model", "layout", "models", "parameters", "dtypes", "needs",
    "component",
)  # fmt: skip


def show_bench(console: Console, found: Mapping[str, Any]) -> None:
    """Print a benchmark: what a video takes, by phase."""
    timings, hardware = found["timings"], found["hardware"]
    where = ", ".join(hardware["gpus"]) or hardware["cpu"]
    runs = len(found["runs"])
    one = f"{found['seconds_per_step']:.3g} s a step, {found['decoded_frames_per_second']:.3g} frames a second decoded"
    console.print(f"A video takes {timings['total_s']:.3g} s on {where}: {one}.")
    console.print(f"{found['model']}, {length(found['settings'])}; median of {runs} run{'s' * (runs > 1)}.")
    predicted, first = format_seconds(found["predicted_seconds"]), found["first_run"]["total_s"]
    console.print(f"The plan predicted {predicted}. The first run took {first:.3g} s: it loads and prepares.\n")
    lines = []
    for row in found["profile"]:
        best = f"{row['of_floor']:.0%} of what the device can do" if row.get("of_floor") else ""
        if row["seconds"] >= 0.0005:
            lines.append((row["phase"], f"{row['seconds']:.3f}", f"{row['share']:.0%}", best))
    rows(console, lines, "phase (last run)", "seconds", "share", "")
    console.print()
    for device, size in found["peak_memory_bytes"].items():
        expected = found["predicted_peak_bytes"].get(device)
        before = f", predicted {format_bytes(expected)}" if expected else ""
        console.print(f"Memory of {device}: {format_bytes(size)} at most{before}")
    kinds = [(name, text(name, found[name])) for name in ("attention", "kernels", "vae_kernels") if found.get(name)]
    rows(console, kinds)
    for note in found["rungs"]:
        console.print(f"Note: {printable(text('rungs', note))}")
    console.print(text_of_versions(found["versions"]))


def text_of_versions(versions: Mapping[str, Any]) -> str:
    """Return versions as one line."""
    return "Versions: " + ", ".join(f"{name} {printable(str(version))}" for name, version in versions.items())


def show_verified(console: Console, found: Mapping[str, Any]) -> None:
    """Print whether a video that was made again is the same, and if not, in what it and its making differ."""
    name, count = printable(str(found["video"])), found["num_frames"]
    if found["equal"]:
        console.print(f"{name} was made again, and all {count} frames are equal.")
        return
    different = found["different_frames"]
    where = f"{len(different)} of {count} frames differ" if different else "the number of frames differs"
    first = f", the first of them is frame {different[0]}" if different else ""
    console.print(f"{name} was made again, and {where}{first}.")
    if not found["model_equal"]:
        console.print("It was made with other weights than these.")
    then, now = found["versions_then"], found["versions_now"]
    changed = {key: now[key] for key in now if isinstance(then, Mapping) and then.get(key) != now[key]}
    for key, version in changed.items():
        console.print(f"{key} was {printable(str(then.get(key)))}, and is {version}.")


def show_inspected(console: Console, found: Mapping[str, Any]) -> None:
    """Print what a file is in sentences, then what else is known in a table."""
    name = printable(str(found.get("path", "")).replace("\\", "/").rpartition("/")[2]) or "It"
    match found["kind"]:
        case "video":
            lines = [f"{name} is a video{_of_size(found)}."]
        case "latents":
            lines = [f"{name} has latents. The video of them: wanduet decode {printable(str(found.get('path')))}"]
        case "embeddings":
            lines = [f"{name} has the embeddings of a prompt, {found['shape'][0]} tokens."]
            lines.append(f"Prompt: {printable(found['text'])}")
            lines.append(f"A video of it: wanduet generate --embeddings {printable(str(found['path']))}")
            if found["cut"]:
                lines.append(f"Cut off, since it is beyond the model's limit: {printable(found['cut'])}")
        case "weights":
            lines = [line for one in found.get("models", [found]) for line in _weights(name, one)]
        case "lora":
            made_for = f" for {' or '.join(found['fits'])}" if found["fits"] else ""
            lines = [
                f"{name} is a LoRA{made_for}. A video with it: wanduet generate PROMPT --lora {printable(found['path'])}"
            ]
        case kind:
            lines = [f"{name} is {printable(str(kind))}."]
    for line in (*lines, *_made_by(found.get("made_by"))):
        console.print(line)
    fields(console, found, IN_SENTENCES)


def _of_size(found: Mapping[str, Any]) -> str:
    if "width" not in found:
        return ""
    size = f"{found['width']}x{found['height']}, {found['num_frames']} frames at {found['fps']:g} a second"
    return f" of {size} ({found['duration_s']:.3g} s), {found['codec']}, {format_bytes(found['num_bytes'])}"


def _weights(name: str, one: Mapping[str, Any]) -> list[str]:
    size = f"{one['parameters'] / 1e9:.3g} billion" if one["parameters"] >= 1e8 else f"{one['parameters']:,}"
    stored = one["quantisation"] or ", ".join(one["dtypes"])
    layout = f"{one['layout']} layout, {stored}, {size} parameters"
    lines = [f"{name} is {printable(one['model'])} ({printable(layout)})."]
    if one["runs"]:
        needs = f" It needs {', '.join(one['needs'])} beside it." if one["needs"] else ""
        return [*lines, f"wanduet runs it.{needs}"]
    return [*lines, f"wanduet does not run it: {printable(str(one['problem']))}", printable(str(one["hint"] or ""))]


def _made_by(made_by: Any) -> list[str]:
    """Return who made a file, by its own metadata, which anybody may have written; nothing without them."""
    if not isinstance(made_by, Mapping):
        return []
    from wanduet.media.provenance import summary

    request, model = made_by.get("request"), made_by.get("model")
    lines = []
    if isinstance(request, Mapping):
        lines.append(f"Prompt: {printable(str(request.get('prompt')))}")
        if isinstance(model, Mapping):
            lines.append(f"Made by {printable(summary(made_by))}")
    version = made_by.get("versions")
    if isinstance(version, Mapping):
        lines.append(printable(f"With wanduet {version.get('wanduet')}, torch {version.get('torch')}"))
    return lines
