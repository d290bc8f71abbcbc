"""Prints a plan for people: one sentence, what each device needs, the settings with their reasons, what fits instead."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from wanduet.config import format_bytes, format_seconds
from wanduet.doors.cli.tables import length, rows
from wanduet.family.speeds import forecast
from wanduet.meta.prices import in_words

PHASES = {"encode": "encoding the text", "denoise": "denoising", "decode": "decoding"}
SHARED = {"placed": ", where one denoises and one decodes", "parallel": ", which make it together"}
IDLE = "without effect"  # how the reason of a setting begins that does nothing here


def show_plan(console: Console, plan: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """`settings`: the resolved request's; {} leaves them out of the sentence."""
    video = f"{length(settings)}: " if settings else ""
    names = {d["name"]: plan.get("hardware", {}).get(d["name"]) or d["name"] for d in plan["devices"]}
    on = _counted(list(names.values())) + SHARED.get(plan["strategy"], "")
    if plan["fits"]:
        console.print(f"{video}fits on {on}, and takes about {format_seconds(plan['predicted_seconds']['total'])}.")
    else:
        console.print(f"{video}does not fit on {on}. {'; '.join(_short(plan, names))}.")
    for nearest in plan["nearest_that_fits"]:
        flags = [f"--{k.replace('_', '-')} {v}" for k, v in nearest.items() if not k.startswith("predicted")]
        console.print(f"  What fits: {' '.join(flags)} (about {format_seconds(nearest['predicted_seconds'])})")
    if work := forecast(plan):
        console.print(f"{work[0].upper()}{work[1:]}.")
    if "prompts" in (plan.get("price") or {}):  # measured
        console.print(f"Measured here: {in_words(plan['price'])}")
    console.print()
    phases = [p for p in PHASES if p != "encode" or any(d["phases"][p] for d in plan["devices"])]
    lines = []
    for device in plan["devices"]:
        name = (
            device["name"] if names[device["name"]] == device["name"] else f"{device['name']} {names[device['name']]}"
        )
        cells = [format_bytes(device["phases"].get(phase, 0)) for phase in phases]
        lines.append((name, device["role"], *cells, format_bytes(device["limit_bytes"])))
    rows(console, lines, "device", "role", *phases, "may use")
    host, limit = format_bytes(plan["host_bytes"]), format_bytes(plan["host_limit_bytes"])
    console.print(f"Host memory: {host} of {limit}, for the text encoder and frames.\n")
    choices = [(c["setting"], str(c["value"]), c["why"]) for c in plan["choices"] if not c["why"].startswith(IDLE)]
    rows(console, choices, "setting", "value", "why")


def _counted(names: list[str]) -> str:
    """Return `one RTX 3090`, `2 RTX 3090`, `cuda:0 and cuda:1`, or `the CPU`."""
    if set(names) == {"cpu"}:
        return "the CPU"
    found = Counter(names)
    parts = [name if ":" in name else f"{'one' if count == 1 else count} {name}" for name, count in found.items()]
    return " and ".join(parts)


def _short(plan: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """Return what needs more than it may use."""
    found = []
    for device in plan["devices"]:
        phase, most = max(device["phases"].items(), key=lambda one: one[1])
        if most > device["limit_bytes"]:
            need, limit = format_bytes(most), format_bytes(device["limit_bytes"])
            name = names[device["name"]]
            found.append(f"{PHASES[phase].capitalize()} needs {need} on {name}, of which {limit} may be used")
    if plan["host_bytes"] > plan["host_limit_bytes"]:
        need, limit = format_bytes(plan["host_bytes"]), format_bytes(plan["host_limit_bytes"])
        found.append(f"It needs {need} of host memory, of which {limit} may be used")
    return list(dict.fromkeys(found)) or ["No setting of this size does"]
