"""Prints results for people: what `--json` prints, as a table or a few lines."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from wanduet.config import format_bytes
from wanduet.doors.cli.checklist import show_doctor
from wanduet.doors.cli.looks import show_bench, show_inspected, show_verified
from wanduet.doors.cli.plans import show_plan
from wanduet.doors.cli.tables import fields
from wanduet.untrusted import printable

_HIDDEN = ("settings",)
TABLE_WIDTH = 200  # the most columns of prices' table, more than it needs
KINDS = ("rungs", "accelerators", "changes", "fewer_steps")  # the rows of prices

# Imports take less at each start; above this, kernels were compiled or measured, which later runs reuse.
LONG_PREPARING_S = 10.0


def show(value: Mapping[str, Any]) -> None:
    """Print a result to stdout."""
    # Prompts are printed verbatim: [markup] and :emoji: in them are not interpreted.
    console = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
    if "devices" in value:
        show_plan(console, value, value.get("settings", {}))
    elif "plan" in value and "timings" not in value:
        show_plan(console, value["plan"], value["settings"])
        console.print(f"\nWould be written: {value['output']}")
    elif "advice" in value and "gpus" in value:
        show_doctor(console, value)
    elif "seconds_per_step" in value:
        show_bench(console, value)
    elif "equal" in value and "different_frames" in value:
        show_verified(console, value)
    elif "kind" in value:
        show_inspected(console, value)
    elif "timings" in value and "output" in value:
        _show_video(console, value)
    elif "rungs" in value and "controls" in value:
        _show_prices(console, value)
    elif "videos" in value and "failed" in value:
        _show_batch(console, value)
    else:
        fields(console, value, _HIDDEN)


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
    rows = [(row.get("speed") or row["name"], row) for kind in KINDS for row in prices.get(kind, ())]
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
