"""The golden files: what each of them holds, how it is written, how it is compared."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import capture
import internals
from capture import Workshop

DATA = Path(__file__).parent / "data"
EXACT = bool(os.environ.get("WANDUET_GOLDEN_EXACT"))  # read now: no case is captured with such variables
Json = Any

# By how much numbers may differ from one kind of CPU to another, as a share of the largest; frames in levels of 255. Seen
# between AVX-512 and SSE 4.1, up to five steps: 2.2e-5 in float32.
FLOAT32, BFLOAT16 = 5e-5, 2e-2
LEVELS, LEVELS_BFLOAT16 = 1, 4


def _each(names: Any, make: Callable[[str], Json]) -> dict[str, Callable[[Workshop], Json]]:
    return {name: lambda _, name=name: make(name) for name in names}


# Of each file its cases, and those of them that are too slow for every run.
FILES: dict[str, dict[str, Callable[[Workshop], Json]]] = {
    "plans": _each([*capture.PLANS, *capture.SLOW_PLANS], capture.plan),
    "plan_texts": _each([*capture.TEXTS, *capture.SLOW_TEXTS], capture.plan_text),
    "refusals": _each(capture.REFUSED, capture.refusal),
    "flags": _each(capture.COMMANDS, capture.flags_of),
    "results": {"generate and others": lambda _: capture.results(), "bench": lambda _: capture.bench()},
    "openapi": {"schema": lambda shop: internals.openapi(shop.folder / "server")},
    "engine": capture.ENGINE,
    "pipeline": capture.PIPELINE,
    "ranks": capture.RANKS,
}
SLOW = {
    "plans": set(capture.SLOW_PLANS),
    "plan_texts": set(capture.SLOW_TEXTS),
    "results": {"bench"},
    "ranks": set(capture.RANKS),
}


def read(file: str) -> dict[str, Json]:
    """A golden file's cases."""
    found: dict[str, Json] = json.loads((DATA / f"{file}.json").read_text(encoding="utf-8"))
    return found


def write(file: str, cases: dict[str, Json]) -> int:
    """Write a golden file, lists of plain values on one line; returns its bytes."""
    text = json.dumps(cases, indent=1, ensure_ascii=False)
    plain = r"(?:-?[\d.]+(?:[eE][-+]?\d+)?|\"(?:[^\"\\\n]|\\.){0,40}\")"
    text = re.sub(rf"\[\s+({plain}(?:,\s+{plain})*)\s+\]", lambda m: "[" + re.sub(r",\n\s+", ", ", m[1]) + "]", text)
    assert json.loads(text) == cases
    DATA.mkdir(exist_ok=True)
    path = DATA / f"{file}.json"
    path.write_text(f"{text}\n", encoding="utf-8", newline="\n")
    return path.stat().st_size


def differences(expected: Json, got: Json, loose: bool, where: str = "") -> Iterator[str]:
    """What is not as expected, a line each; `loose` allows numbers what bfloat16 may differ by."""
    if isinstance(expected, dict) and isinstance(got, dict) and {"sha256", "dtype"} <= expected.keys() & got.keys():
        yield from _numbers(expected, got, loose, where)
    elif isinstance(expected, dict) and isinstance(got, dict):
        for name in [*expected, *(name for name in got if name not in expected)]:
            if name not in got or name not in expected:
                yield f"{where}.{name}: {'is missing' if name in expected else 'is new'}"
            else:
                yield from differences(expected[name], got[name], loose, f"{where}.{name}")
    elif isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        for index, (one, other) in enumerate(zip(expected, got, strict=True)):
            yield from differences(one, other, loose, f"{where}[{index}]")
    elif type(expected) is not type(got) or expected != got:
        yield f"{where}: expected {expected!r}, got {got!r}"


def _numbers(expected: Json, got: Json, loose: bool, where: str) -> Iterator[str]:
    if (kind := (expected["shape"], expected["dtype"])) != (other := (got["shape"], got["dtype"])):
        yield f"{where}: expected {kind}, got {other}"
        return
    if EXACT and expected["sha256"] != got["sha256"]:
        yield f"{where}: other bits"
    if expected["dtype"] == "uint8":
        allowed = LEVELS_BFLOAT16 if loose else LEVELS
        whole = allowed / 4
    else:
        allowed = (BFLOAT16 if loose else FLOAT32) * expected["largest"]
        whole = allowed
    apart = max(abs(a - b) for a, b in zip(expected["sample"], got["sample"], strict=True))
    if not apart <= allowed:  # also where it is NaN
        yield f"{where}: a value is {apart:.3g} apart, {allowed:.3g} is allowed"
    for name in ("mean", "std"):
        if not math.isclose(expected[name], got[name], rel_tol=0, abs_tol=whole):
            yield f"{where}: the {name} is {got[name]}, expected {expected[name]} up to {whole:.3g}"
