"""The page's HTML: functions that convert a job to a string. All text that a user wrote is escaped."""

import base64
import hashlib
import time
from collections.abc import Sequence
from html import escape
from typing import Any

from wanduet.doors.http.public import public_error
from wanduet.doors.page.clips import Clip, Offer
from wanduet.doors.page.forms import FORM_FIELDS, clips_of
from wanduet.errors import InvalidRequestError
from wanduet.family.speeds import forecast
from wanduet.jobs.records import CANCELLED, StoredJob
from wanduet.request import REQUEST_FIELDS
from wanduet.schedule import joined

PHASES = {
    "verify": "Checking the weights",
    "load": "Loading the model",
    "encode": "Reading the prompt",
    "encode_video": "Reading the input video",
    "denoise": "Denoising",
    "decode": "Decoding",
}


def title(job: StoredJob) -> str:
    """Return a job's state in one word."""
    if job.error is not None:
        return "Cancelled" if job.error.code == CANCELLED else "Failed"
    return {"queued": "Waiting", "in_progress": "Running", "completed": "Done"}.get(job.status, job.status)


def header(model: str, worker_ready: bool, running: int, waiting: int, *, signed_in: bool = False) -> str:
    """Return the line at the top."""
    state = "ready" if worker_ready else "starting, or no worker runs"
    counts = "".join(f" · {count} {word}" for count, word in ((running, "running"), (waiting, "waiting")) if count)
    dot = "on" if worker_ready else "off"
    leave = '<form method="post" action="/logout"><button>Sign out</button></form>' if signed_in else ""
    return (
        f'<h1>wanduet</h1><span class="state"><i class="dot {dot}"></i>{escape(model)} · {state}{counts}</span>{leave}'
    )


def empty_stage(examples: Sequence[str]) -> str:
    """Return what is displayed before there is a video: examples of prompts."""
    buttons = "".join(
        f'<button type="button" data-prompt="{escape(text, quote=True)}">{escape(text)}</button>' for text in examples
    )
    return (
        '<div class="stage empty"><div class="note"><p>Describe a scene and press Generate, '
        f'or start with one of these.</p><div class="examples">{buttons}</div></div></div>'
    )


def stage(job: StoredJob, preview: bytes | None = None) -> str:
    """Return the large picture: the preview while a job runs, then its video or videos."""
    kind = ""
    if job.status == "completed":
        numbers = sorted(file.index for file in job.files if file.variant == "video") or [0]
        kind = " many" if len(numbers) > 1 else ""
        inner = "".join(_video(job, number) for number in numbers)
    elif job.error is not None:
        text = "Stopped before it was done." if job.error.code == CANCELLED else escape(public_error(job.error).message)
        inner = f'<p class="note">{text}</p>'
    elif preview is not None:
        image = base64.b64encode(preview).decode()
        inner = (
            f'<img class="preview" src="data:image/webp;base64,{image}" alt="Preview"><span class="tag">Preview</span>'
        )
    else:
        inner = f'<p class="note">{"Waiting for its turn" if job.status == "queued" else "Taking shape"}</p>'
    return f'<div class="stage{kind}">{inner}</div>'


def _video(job: StoredJob, number: int) -> str:
    part = f"&index={number}" if number else ""
    source, poster = f"/v1/videos/{job.id}/content?variant=video", f"/v1/videos/{job.id}/content?variant=thumbnail"
    player = ' id="player"' if not number else ""
    return (
        f'<video{player} src="{source}{part}" poster="{poster}{part}" controls autoplay loop muted playsinline '
        f'aria-label="{escape(_prompt(job), quote=True)}"></video>'
    )


def progress(job: StoredJob | None, ahead: int = 0) -> str:
    """Return a job's progress as a line and a bar, or the time that it took. `ahead`: number of jobs before it."""
    if job is None:
        return ""
    words, note = title(job), ""
    if job.status == "in_progress":
        words = PHASES.get(job.phase, "Starting")
        left = f"about {duration(job.seconds_left)} left" if job.seconds_left else ""
        bar = f'<div class="bar"><i style="width:{job.progress:.1f}%"></i></div>'
        return f'<div class="progress"><b>{words}</b><span>{left}</span><em>{job.progress:.0f} %</em>{bar}</div>'
    if job.status == "completed" and job.started_at and job.completed_at:
        note = f"made in {duration(job.completed_at - job.started_at)}"
    elif job.status == "queued":
        before = f"{ahead} of your videos {'is' if ahead == 1 else 'are'} before it; " if ahead else ""
        note = f"{before}you can close this page, it stays in the queue"
    return f'<div class="progress"><b>{words}</b><span>{note}</span></div>'


def details(job: StoredJob | None) -> str:
    """Return the prompt and all settings."""
    if job is None:
        return ""
    request = job.request
    values = _settings(request)
    if len(seeds := job.report.get("seeds", ())) > 1:
        values["Seed"] = ", ".join(map(str, seeds))  # in the order of the videos
    rows = "".join(f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in values.items())
    negative = request.get("negative_prompt")
    without = f'<p class="negative"><b>Without:</b> {escape(negative)}</p>' if negative else ""
    warnings = "".join(f'<p class="message bad">{escape(str(text))}</p>' for text in job.report.get("warnings", ()))
    made = time.strftime("%d %b %Y, %H:%M", time.localtime(job.created_at))
    return (
        f'<div class="details"><p class="prompt">{escape(_prompt(job))}</p>{warnings}<dl>{rows}</dl>{without}'
        f'<p class="fine">{_downloads(job)}{escape(job.model)} · {made} · <code>{job.id}</code></p></div>'
    )


def _settings(request: dict[str, Any]) -> dict[str, str]:
    """Return a request's settings by their labels; settings that it does not have, or that are off, are omitted."""
    files = [field.label.lower() for name, field in REQUEST_FIELDS.items() if field.shown.is_file and request.get(name)]
    made_from = " and ".join(f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in files)
    return (
        {
            "Size": f"{request.get('width')} × {request.get('height')}",
            "Length": _length(request.get("num_frames"), request.get("fps")),
            "Frames": f"{request.get('num_frames')} at {request.get('fps')} a second",
        }
        | {
            field.label if field.shown.detail is None else field.shown.detail: _value(request[name])
            for name, field in REQUEST_FIELDS.items()
            if field.shown.detail != "" and request.get(name) not in (None, field.shown.off)
        }
        | ({"Made from": made_from} if made_from else {})
    )


def _downloads(job: StoredJob) -> str:
    if job.status != "completed":
        return ""
    numbers = sorted(file.index for file in job.files if file.variant == "video") or [0]
    names = ["Download the MP4"] if len(numbers) == 1 else [f"Download MP4 {number + 1}" for number in numbers]
    return "".join(
        f'<a href="/v1/videos/{job.id}/content?variant=video&index={number}" '
        f'download="{job.id}{f"-{number + 1}" if number else ""}.mp4">{name}</a>'
        for number, name in zip(numbers, names, strict=True)
    )


def gallery(jobs: Sequence[StoredJob], chosen: str | None, *, more: bool = False) -> str:
    """Return all videos as cards; a click on a card displays its video."""
    if not jobs:
        return '<p class="fine">Your videos will be here, with everything that made them.</p>'
    older = '<button type="button" class="older" data-older>Older videos</button>' if more else ""
    return f'<div class="cards">{"".join(_card(job, job.id == chosen) for job in jobs)}</div>{older}'


def _card(job: StoredJob, chosen: bool) -> str:
    if job.status == "completed":
        picture = f'<img loading="lazy" src="/v1/videos/{job.id}/content?variant=thumbnail" alt="">'
        badge = ""
    else:
        picture, badge = "", f'<span class="badge {job.status}">{title(job)}</span>'
    bar = f'<i class="line" style="width:{job.progress:.0f}%"></i>' if job.status == "in_progress" else ""
    text = escape(_prompt(job), quote=True)
    about = escape(" · ".join(_short(job.request)))
    return (
        f'<button type="button" class="card{" chosen" if chosen else ""}" data-id="{job.id}" title="{text}">'
        f'<span class="frame">{picture}{badge}{bar}</span><span class="caption">{text}</span>'
        f'<span class="about">{about}</span></button>'
    )


def _short(request: dict[str, Any]) -> list[str]:
    count = request.get("num_videos_per_prompt") or 1
    many = [f"{count} videos"] if count > 1 else []
    return [*many, _length(request.get("num_frames"), request.get("fps")), f"seed {request.get('seed')}"]


def message(text: str, kind: str = "") -> str:
    """Return a line below the form: a response or an error."""
    return f'<p class="message {kind}" role="status">{escape(text)}</p>' if text else ""


def refusal(error: Exception) -> str:
    """Return an error, with fields named as on the page."""
    if not isinstance(error, InvalidRequestError):
        return message(" ".join(str(error).split()), "bad")
    given = _number(error.given)
    field = REQUEST_FIELDS.get(error.field) or FORM_FIELDS.get(error.field)
    label = error.field if field is None else field.label
    if field is not None and field.shown.within not in (None, error.field):
        given = f"a {error.field} of {given}"  # the form combines the field with another
    if error.nearest is None or error.field == "size":
        return message(f"{label}: {error.allowed}.", "bad")
    return message(f"{label}: {given} does not work, {error.nearest} does.", "bad")


def sent_refusal(text: str, param: str | None) -> str:
    """Return the API's error for what the browser submitted, with its field named as on the page."""
    field = REQUEST_FIELDS.get(param or "")
    words = text.rpartition(" is not allowed: ")[2].removeprefix(f"{param}: ")
    return message(words if field is None else f"{field.label}: {words}", "bad")


def no_clip(error: str = "") -> str:
    """Return the line that asks for a video to start from, and why the one that was chosen is of no use."""
    return (
        '<p class="fine upload">Drop a video on this page, or <label>choose one<input type="file" '
        'accept="video/*,.mkv"></label>, to start from its pictures or to use its settings.</p>'
        f"{message(error, 'bad')}"
    )


def clip(chosen: Clip | None) -> str:
    """Return the input video that the form starts from, with a way to remove it."""
    if chosen is None:
        return no_clip()
    return _clip(chosen, f"<p>Starts from the pictures of <b>{escape(chosen.name)}</b></p>{_about(chosen)}")


def offer(dropped: Offer) -> str:
    """Return what can be done with a video that was dropped."""
    uses = {"start": "Start from its pictures"} if dropped.clip else {}
    uses |= {"settings": "Use its settings"} if dropped.form is not None else {}
    buttons = "".join(f'<button type="button" data-use="{use}">{words}</button>' for use, words in uses.items())
    about = _about(dropped.clip) if dropped.clip else f'<p class="fine">{escape(dropped.error)}</p>'
    return _clip(dropped.clip, f"<p><b>{escape(dropped.name)}</b></p>{about}", f'<p class="uses">{buttons}</p>')


def _clip(shown: Clip | None, text: str, uses: str = "") -> str:
    # The browser has the file: a script sets the picture.
    picture = f'<video data-clip="{shown.sha256}" muted autoplay loop playsinline></video>' if shown else ""
    leave = '<button type="button" class="leave" data-use="remove" aria-label="Remove" title="Remove">×</button>'
    return f'<div class="clip" role="group" aria-label="Input video">{picture}<div>{text}</div>{leave}{uses}</div>'


def _about(shown: Clip) -> str:
    if (source := shown.source) is None:
        return ""
    return f'<p class="fine">{source.width} × {source.height} · {source.seconds:.1f} s</p>'


def settings_line(form: dict[str, Any]) -> str:
    """Return the form in one line, for when only the presets are visible."""
    parts = (
        str(form.get("size") or "").replace("x", " × "),
        _length(form.get("num_frames"), form.get("fps")),
        f"timesteps {listed}"
        if (listed := form.get("timesteps"))
        else f"{_number(form.get('num_inference_steps'))} steps",
        f"starts from {next(iter(clips.values())).name}" if (clips := clips_of(form)) else "",
        f"seed {form['seed']}" if form.get("seed") else "a new seed",
        f"{form['num_videos_per_prompt']:g} videos" if (form.get("num_videos_per_prompt") or 1) > 1 else "",
    )
    return " · ".join(part for part in parts if part)


def mark_of(values: Sequence[Any]) -> str:
    """Return an HTML attribute that identifies the values which a response belongs to."""
    return f'data-answers="{hashlib.sha256(repr(tuple(values)).encode()).hexdigest()[:16]}"'


def plan_panel(plan: dict[str, Any], line: str) -> str:
    """Return the plan as HTML: whether it fits, the time, and the memory by device."""
    from wanduet.config import format_bytes

    rows = ""
    for device in plan["devices"]:
        need, limit = max(device["phases"].values(), default=0), device.get("limit_bytes") or 0
        share = f'<i style="width:{min(100.0, 100 * need / limit):.0f}%"></i>' if limit else ""
        known = f"{format_bytes(need)} of {format_bytes(limit)}" if limit else format_bytes(need)
        rows += f"<li><span>{escape(device['name'])}</span><span>{known}</span><b>{share}</b></li>"
    if plan["fits"]:
        seconds = plan.get("predicted_seconds", {}).get("total")
        text, kind = "Fits" + (f": about {duration(seconds)}" if seconds else ""), "good"
    else:
        nearest = plan["nearest_that_fits"]
        wanted = {k: v for k, v in nearest[0].items() if not k.startswith("predicted")} if nearest else {}
        hint = " Try " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in wanted.items()) + "." if wanted else ""
        text, kind = f"Does not fit into this machine's memory.{hint}", "bad"
    if work := forecast(plan):
        line = f"{line} · {work}"
    return f'{message(text, kind)}<p class="fine">{escape(line)}</p><ul class="memory">{rows}</ul>'


def duration(seconds: float) -> str:
    """Format seconds for people."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _length(frames: Any, fps: Any) -> str:
    """Return how long a video plays; a single frame is a picture."""
    if not frames or not fps:
        return ""
    return "1 frame" if frames == 1 else f"{frames / fps:.1f} s"


def _prompt(job: StoredJob) -> str:
    return str(job.request.get("prompt", ""))


def _value(value: Any) -> str:
    """Format a setting: a float with its significant digits, a boolean as a word, a list with spaces."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return joined(value).replace(",", ", ")
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)
