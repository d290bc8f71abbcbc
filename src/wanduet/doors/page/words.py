"""What the page says of jobs, plans and errors, as JSON: fields have their labels, numbers their units."""

import math
from collections.abc import Mapping
from typing import Any

from wanduet.config import format_bytes
from wanduet.doors.http.public import public_text
from wanduet.doors.http.schemas import to_video
from wanduet.doors.page.forms import FORM_FIELDS, SIZE, down
from wanduet.errors import InvalidRequestError
from wanduet.family.speeds import forecast
from wanduet.jobs.records import CANCELLED, StoredJob
from wanduet.request import REQUEST_FIELDS
from wanduet.schedule import joined

SLOW_SECONDS = 30 * 60  # a plan that takes longer is marked
PHASES = {
    "verify": "Checking the weights",
    "load": "Loading the model",
    "encode": "Reading the prompt",
    "encode_video": "Reading the input video",
    "denoise": "Denoising",
    "decode": "Decoding",
}


def card(job: StoredJob) -> dict[str, Any]:
    """Return a job as the page shows it: the API's video object, with words for its state and its settings."""
    took = job.completed_at - job.started_at if job.completed_at and job.started_at else None
    videos = sum(file.variant == "video" for file in job.files) if job.status == "completed" else 0
    return to_video(job).model_dump() | {
        "title": title(job),
        "phase": PHASES.get(job.phase, "Starting"),
        "seconds_left": job.seconds_left,
        "took": took,
        "videos": max(1, videos),
        "warnings": [public_text(str(text)) for text in job.report.get("warnings", ())],
        "rows": list(map(list, _settings(job).items())),
        "length": length(job.request.get("num_frames"), job.request.get("fps")),
        "finished": job.finished,
        "has_input": bool(job.inputs),
    }


def title(job: StoredJob) -> str:
    """Return a job's state in one word."""
    if job.error is not None:
        return "Cancelled" if job.error.code == CANCELLED else "Failed"
    return {"queued": "Waiting", "in_progress": "Running", "completed": "Done"}.get(job.status, job.status)


def _settings(job: StoredJob) -> dict[str, str]:
    """Return a job's settings by their labels; settings that it does not have, or that are off, are omitted."""
    request = job.request
    files = [field.label.lower() for name, field in REQUEST_FIELDS.items() if field.shown.is_file and request.get(name)]
    made_from = " and ".join(f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in files)
    rows = {
        "Size": f"{request.get('width')} × {request.get('height')}",
        "Length": length(request.get("num_frames"), request.get("fps")),
        "Frames": f"{request.get('num_frames')} at {request.get('fps')} a second",
    } | {
        field.label if field.shown.detail is None else field.shown.detail: _value(request[name])
        for name, field in REQUEST_FIELDS.items()
        if field.shown.detail != "" and request.get(name) not in (None, field.shown.off)
    }
    if len(seeds := job.report.get("seeds", ())) > 1:
        rows["Seed"] = ", ".join(map(str, seeds))  # in the order of the videos
    loras = ", ".join(f"{lora['name']} {lora['strength']:g}" for lora in request.get("loras") or ())
    return rows | ({"LoRA": loras} if loras else {}) | ({"Made from": made_from} if made_from else {})


def refusal(error: Exception, form: Mapping[str, Any]) -> dict[str, Any]:
    """Return an error as a plan: its `text`, with fields named as on the page, and `fixes`, values that are allowed."""
    if not isinstance(error, InvalidRequestError):
        return {"kind": "bad", "text": public_text(" ".join(str(error).split())), "fixes": []}
    given, name = _number(error.given), error.field
    field = REQUEST_FIELDS.get(name) or FORM_FIELDS.get(name)
    label = name if field is None else field.label
    if field is not None and field.shown.within not in (None, name):
        given = f"a {name} of {given}"  # the form combines the field with another
    text = f"{label}: {given} does not work, {error.nearest} does."
    if error.nearest is None:
        text = f"{label}: {error.allowed}."
    values = (
        [] if error.nearest is None else [_typed(value, error.nearest) for value in str(error.nearest).split(" or ")]
    )
    changes = [change for value in values if (change := _change(name, value, form))]
    if name == SIZE and changes:
        smaller = f"{changes[0]['width']} × {changes[0]['height']}"
        text = f"{label}: {str(form[SIZE]).replace('x', ' × ')} is too much for this server, {smaller} is not."
    fixes = [fix(change) for change in changes]
    return {"kind": "bad", "text": public_text(text), "fixes": fixes}


def _typed(text: str, nearest: Any) -> Any:
    return nearest if not isinstance(nearest, str) else int(text) if text.isdigit() else text


def _change(name: str, value: Any, form: Mapping[str, Any]) -> dict[str, Any]:
    """Return what to set so that a request's field has this value; {} if that is not known."""
    sides = dict(zip(("width", "height"), str(form.get(SIZE)).lower().partition("x")[::2], strict=True))
    if all(side.isdecimal() for side in sides.values()):
        if name in sides:
            return sides | {name: value}
        if name == SIZE:  # pixels in all
            width, height = map(int, sides.values())
            share = math.sqrt(value / (width * height))
            return {"width": down(width * share), "height": down(height * share)}
    return {name: value} if name in FORM_FIELDS and name != SIZE else {}


def fix(change: Mapping[str, Any]) -> dict[str, Any]:
    """Return a change of the form: the `text` of its button and what it sets."""
    values = {name: value for name, value in change.items() if name not in ("height", "width")}
    words = [f"{FORM_FIELDS[name].label.lower()} {_number(value)}" for name, value in values.items()]
    if "height" in change and "width" in change:
        values[SIZE] = f"{change['width']}x{change['height']}"
        words.insert(0, f"{change['width']} × {change['height']}")
    return {"text": f"Use {', '.join(words)}", "set": values}


def plan_words(plan: dict[str, Any]) -> dict[str, Any]:
    """Return a plan for people: its `kind` (good, slow or bad), `text`, the memory by device, and what fits instead."""
    memory = []
    for device in plan["devices"]:
        need, limit = max(device["phases"].values(), default=0), device.get("limit_bytes") or 0
        words = f"{format_bytes(need)} of {format_bytes(limit)}" if limit else format_bytes(need)
        memory.append(_row(device["name"], words, need, limit))
    need, limit = plan.get("host_bytes") or 0, plan.get("host_limit_bytes") or 0
    if need > limit > 0:
        memory.append(_row("host memory", f"{format_bytes(need)} of {format_bytes(limit)}", need, limit))
    seconds = plan.get("predicted_seconds", {}).get("total")
    fits = plan["fits"]
    kind = "bad" if not fits else "slow" if seconds and seconds > SLOW_SECONDS else "good"
    text = (
        "Fits" + (f": about {duration(seconds)}" if seconds else "")
        if fits
        else "Does not fit into this machine's memory."
    )
    changes = (
        []
        if fits
        else [{k: v for k, v in near.items() if not k.startswith("predicted")} for near in plan["nearest_that_fits"]]
    )
    names = {*FORM_FIELDS, "height", "width"}
    fixes = [fix(change) for change in changes if change and change.keys() <= names]
    others = [
        ", ".join(f"--{k.replace('_', '-')} {v}" for k, v in one.items()) for one in changes if not one.keys() <= names
    ]
    if others:
        text += f" The server would need {' or '.join(others)}."
    return {"kind": kind, "text": text, "fixes": fixes, "memory": memory, "work": forecast(plan)}


def _row(name: str, words: str, need: int, limit: int) -> dict[str, Any]:
    share = min(1.0, need / limit) if limit else 0.0
    return {"name": name, "text": words, "share": round(share, 4), "fits": not limit or need <= limit}


def duration(seconds: float) -> str:
    """Format seconds for people."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{round(minutes / 60 / 24)} days"


def length(frames: Any, fps: Any) -> str:
    """Return how long a video plays; a single frame is a picture."""
    if not frames or not fps:
        return ""
    return "1 frame" if frames == 1 else f"{frames / fps:.1f} s"


def _value(value: Any) -> str:
    """Format a setting: a float with its significant digits, a boolean as a word, a list with spaces."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return joined(value).replace(",", ", ")
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
