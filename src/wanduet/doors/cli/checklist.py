"""Prints for people what `wanduet doctor` has found: a checklist, with what to do for each item that is not well."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from wanduet.config import format_bytes
from wanduet.doors.cli.looks import text_of_versions
from wanduet.doors.cli.tables import fields, rows
from wanduet.untrusted import printable

WELL, NOT_WELL = "ok", "!!"


@dataclass(frozen=True, slots=True)
class Check:
    """One item: what it is, what was found, and what to do; well if there is nothing to do."""

    name: str
    found: str
    to_do: tuple[str, ...] = ()


def show_doctor(console: Console, found: Mapping[str, Any]) -> None:
    """Print a sentence, the checklist, then measurements and versions."""
    checks = list(_checks(found))
    wrong = [check for check in checks if check.to_do]
    items = "1 item needs" if len(wrong) == 1 else f"{len(wrong)} items need"
    console.print(f"{items} a look." if wrong else "All is well.")
    console.print()
    lines = []
    for check in checks:
        lines.append((NOT_WELL if check.to_do else WELL, check.name, printable(check.found)))
        lines += [("", "", f"-> {printable(to_do)}") for to_do in check.to_do]
    rows(console, lines)
    for gpu in found["gpus"]:
        for measured in gpu["attention_measured"]:
            console.print(f"\nAttention on {gpu['name']}, as measured:")
            fields(console, measured)
    for price in found["prices"]:
        where = printable(price["measured_with"])
        console.print(
            f"\nWhat speeds cost with {printable(price['model'])}, as measured{f' at {where}' if where else ''}:"
        )
        fields(console, price["costs"])
    console.print(f"\n{text_of_versions(found['versions'])}")


def _checks(found: Mapping[str, Any]) -> Iterator[Check]:
    """Advice says by its attribute `about` which item it is for; other advice comes last."""
    advice: dict[str, list[str]] = {}
    for one in found["advice"]:
        advice.setdefault(getattr(one, "about", ""), []).append(one)

    def check(name: str, text: str) -> Check:
        return Check(name, text, tuple(advice.pop(name, ())))

    cpu, memory, data = found["cpu"], found["memory"], found["data_folder"]
    gpus = [f"{gpu['name']} {gpu['model']}: {_free(gpu)}" for gpu in found["gpus"]]
    yield check("GPU", "; ".join(gpus) or f"none; the CPU works ({cpu['model']}, {cpu['count']} cores), slowly")
    for line in found["links"]:
        yield Check("link", line)
    if found["gpus"]:
        names = "; ".join(f"{gpu['name']}: {', '.join(gpu['attention'])}" for gpu in found["gpus"])
        yield check("attention", names)
        plain = "; ".join(
            f"{name}: plain operations for {', '.join(ops)}" for name, ops in found["plain_kernels"].items()
        )
        yield check("kernels", plain or found["triton_probe"])
    yield check("memory", _free(memory))
    free = "" if data["free_bytes"] is None else f", {format_bytes(data['free_bytes'])} free"
    yield check("data folder", f"{data['path']}{free}")
    yield _model(found["model"])
    for name, rest in advice.items():
        yield Check(name or "other", "", tuple(rest))


def _free(memory: Mapping[str, Any]) -> str:
    return f"{format_bytes(memory['free_bytes'])} of {format_bytes(memory['total_bytes'])} free"


def _model(model: Mapping[str, Any]) -> Check:
    name = model["name"]
    if "problem" in model:
        hint = model["hint"] or f"Fetch it: wanduet download --model {name}"
        return Check("model", f"{name}: {model['problem']}", (hint,))
    known: dict[bool | None, str] = {
        True: ", complete, every file as published",
        False: ", complete; its files have no known hashes",
    }
    where = f" in {model['path']}" if "path" in model else ""
    files = "".join(f"; {one['path']}: {one['model']}" for one in model.get("files", {}).values() if "model" in one)
    return Check("model", f"{name}{where}{known.get(model.get('verified'), '')}{files}")
