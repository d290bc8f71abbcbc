"""Prints results for people: what `--json` prints, as a table or a few lines."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from wanduet.config import format_bytes, format_seconds
from wanduet.family.speeds import forecast
from wanduet.meta.prices import in_words
from wanduet.untrusted import printable

_HIDDEN = ("settings", "versions", "versions_then", "versions_now", "made_by", "channel_means", "channel_stds")
TABLE_WIDTH = 200  # the most columns of prices' table, more than it needs
KINDS = ("rungs", "accelerators", "fewer_steps")  # the rows of prices

# Imports take less at each start; above this, kernels were compiled or measured, which later runs reuse.
LONG_PREPARING_S = 10.0


def show(value: Mapping[str, Any]) -> None:
    """Print a result to stdout."""
    # Prompts are printed verbatim: [markup] and :emoji: in them are not interpreted.
    console = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
    if "devices" in value:
        _show_plan(console, value)
    elif "plan" in value and "timings" not in value:
        _show_plan(console, value["plan"])
        console.print(f"Would be written: {value['output']}")
    elif "timings" in value and "output" in value:
        _show_video(console, value)
    elif "rungs" in value and "controls" in value:
        _show_prices(console, value)
    elif "videos" in value and "failed" in value:
        _show_batch(console, value)
    else:
        _show_fields(console, value)


def _show_plan(console: Console, plan: Mapping[str, Any]) -> None:
    about = f", about {format_seconds(plan['predicted_seconds']['total'])}" if plan["fits"] else ""
    console.print(f"{plan['strategy']}: {'fits' if plan['fits'] else 'does not fit'}{about}")
    if work := forecast(plan):
        console.print(f"{work[0].upper()}{work[1:]}")
    phases = [
        p for p in ("encode", "denoise", "decode") if p != "encode" or any(d["phases"][p] for d in plan["devices"])
    ]
    table = _table("device", "role", *phases, "may use")
    for device in plan["devices"]:
        cells = [format_bytes(device["phases"].get(phase, 0)) for phase in phases]
        name = " ".join((device["name"], plan.get("hardware", {}).get(device["name"], ""))).strip()
        table.add_row(name, device["role"], *cells, format_bytes(device["limit_bytes"]))
    cells = [*[""] * (len(phases) - 1), format_bytes(plan["host_bytes"])]
    table.add_row("host", "text encoder, frames", *cells, format_bytes(plan["host_limit_bytes"]))
    console.print(table)
    choices = _table("setting", "value", "why")
    for choice in plan["choices"]:
        choices.add_row(choice["setting"], str(choice["value"]), choice["why"])
    console.print(choices)
    if "prompts" in (plan.get("price") or {}):  # measured
        console.print(f"Measured here: {in_words(plan['price'])}")
    for nearest in plan["nearest_that_fits"]:
        change = ", ".join(f"{k}={v}" for k, v in nearest.items() if not k.startswith("predicted"))
        console.print(f"fits: {change} (about {format_seconds(nearest['predicted_seconds'])})")


def _show_video(console: Console, done: Mapping[str, Any]) -> None:
    for warning in done.get("warnings", ()):
        console.print(f"Note: {warning}")
    seconds = " · ".join(f"{k.removesuffix('_s')} {v:.1f} s" for k, v in done["timings"].items() if v >= 0.05)
    console.print(f"Times: {seconds}")
    prepared = done["timings"].get("prepare_s", 0.0)
    if prepared >= LONG_PREPARING_S:
        console.print(f"Prepared in {prepared:.0f} s, once on this machine: kernels and what attention takes are kept.")
    for row in done.get("profile", ()):
        line = f"  {row['phase']:<12} {row['seconds']:8.2f} s {row['share']:6.1%}"
        if row.get("floor_s") and row["of_floor"]:
            line += f"   at least {row['floor_s']:.2f} s here ({row['tflop']:,.2f} TFLOP, {row['gigabytes']:,.2f} GB)"
            line += f": {row['of_floor']:.0%} of what the device can do"
        console.print(line, highlight=False)
    if "trace" in done:
        console.print(f"Trace: {done['trace']} (open it at ui.perfetto.dev)", markup=False, highlight=False)
    memory = " · ".join(f"{device} {format_bytes(size)}" for device, size in done["peak_memory_bytes"].items())
    console.print(f"Peak memory: {memory}")
    for video in done.get("videos", [done]):
        console.print(f"{video['output']} (seed {video['seed']})")


def _show_batch(console: Console, batch: Mapping[str, Any]) -> None:
    for done in batch["videos"]:
        if "error" in done:
            console.print(f"Failed: {printable(done['prompt'])}: {done['error']}")
            continue
        for warning in done.get("warnings", ()):
            console.print(f"Note: {warning}")
        before = ", made before" if done.get("made_before") else ""
        for video in done["videos"]:
            console.print(f"{video['output']} (seed {video['seed']}{before})")
    console.print(f"{len(batch['videos']) - batch['failed']} of {len(batch['videos'])} done.")


def _show_prices(console: Console, prices: Mapping[str, Any]) -> None:
    console.print(f"{prices['name']} on {prices['card']}: the median of the prompts, then the worst")
    forms = {"latents_error": "{:.1%}", "psnr": "{:.1f}", "st_lpips": "{:.3f}", "jod": "{:.2f}"}
    heads = ("", "forwards", "seconds", "latents off", "PSNR, dB", "ST-LPIPS", "JOD")
    table = Table(*(Column(head, no_wrap=True) for head in heads), box=None)
    rows = [(row.get("speed") or row["name"], row) for kind in KINDS for row in prices[kind]]
    for name, row in (*rows, *prices["controls"].items()):
        if not row or "seconds" not in row:
            continue
        found = [(form, row.get(measure)) for measure, form in forms.items()]
        cells = [
            "" if one is None else f"{form.format(one['median'])} {form.format(one['worst'])}" for form, one in found
        ]
        table.add_row(name, f"{row['forwards']:g}", f"{row['seconds']:.3g}", *cells)
    console.width = TABLE_WIDTH  # a narrow terminal wraps lines; a table of its width would cut names and numbers
    console.print(table)
    for note in prices["notes"]:
        console.print(note)


def _show_fields(console: Console, value: Mapping[str, Any]) -> None:
    table = _table("", "", show_header=False)
    for name, field in value.items():
        if name not in _HIDDEN and field not in (None, [], {}):
            table.add_row(name, _text(name, field))
    if value.get("versions"):
        table.add_row("versions", _text("versions", value["versions"]))
    made_by = value.get("made_by")
    if isinstance(made_by, Mapping):
        from wanduet.media.provenance import summary

        parts = {name: made_by.get(name) for name in ("request", "model")}
        if all(isinstance(part, Mapping) for part in parts.values()):  # the file is untrusted
            table.add_row("made by", _text("made by", summary(made_by)))
        if isinstance(parts["request"], Mapping):
            table.add_row("prompt", _text("prompt", parts["request"].get("prompt")))
    console.print(table)


def _table(*columns: str, show_header: bool = True) -> Table:
    """Return a table that wraps a long path instead of truncating it."""
    return Table(*(Column(name, overflow="fold") for name in columns), show_header=show_header)


def _text(name: str, field: Any) -> str:
    if isinstance(field, Mapping):
        unit = name if name.endswith("bytes") else ""  # the unit of everything in it
        return "\n".join(f"{k}: {_text(unit or k, v)}" for k, v in field.items() if v not in (None, [], {}))
    if isinstance(field, list):
        return "\n".join(_text(name, item) for item in field)
    if isinstance(field, int) and name.endswith("bytes"):
        return format_bytes(field)
    return f"{field:.4g}" if isinstance(field, float) else printable(str(field))
