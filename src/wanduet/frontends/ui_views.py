"""The page's pieces of HTML: a job in, a text out. Everything that a user wrote is escaped."""

import base64
import time
from collections.abc import Sequence
from html import escape
from typing import Any

from wanduet.frontends.ui_style import EMPTY_STAGE
from wanduet.jobs.records import CANCELLED, StoredJob

PHASES = {"load": "Loading the model", "encode": "Reading the prompt", "denoise": "Denoising", "decode": "Decoding"}
SETTINGS = (
    ("Size", lambda r: f"{r.get('width')} × {r.get('height')}"),
    ("Frames", lambda r: f"{r.get('num_frames')} at {r.get('fps')} a second"),
    ("Steps", lambda r: r.get("num_inference_steps")),
    ("Guidance", lambda r: _number(r.get("guidance_scale"))),
    ("Shift", lambda r: _number(r.get("flow_shift"))),
    ("Sampler", lambda r: r.get("sampler")),
    ("Seed", lambda r: r.get("seed")),
)


def title(job: StoredJob) -> str:
    """One word for how a job is."""
    if job.error is not None:
        return "Cancelled" if job.error.code == CANCELLED else "Failed"
    return {"queued": "Waiting", "in_progress": "Running", "completed": "Done"}.get(job.status, job.status)


def header(model: str, worker_ready: bool, waiting: int) -> str:
    """The line at the top."""
    state = "ready" if worker_ready else "starting, or no worker runs"
    queue = f" · {waiting} waiting" if waiting else ""
    dot = "on" if worker_ready else "off"
    return f'<h1>wanduet</h1><span class="state"><i class="dot {dot}"></i>{escape(model)} · {state}{queue}</span>'


def stage(job: StoredJob | None, preview: bytes | None = None) -> str:
    """The large picture: what is foreseen while a job runs, then the video itself."""
    if job is None:
        return f'<div class="stage">{EMPTY_STAGE}</div>'
    if job.status == "completed":
        source, poster = f"/v1/videos/{job.id}/content", f"/v1/videos/{job.id}/content?variant=thumbnail"
        inner = (
            f'<video id="player" src="{source}" poster="{poster}" '
            f'controls autoplay loop muted playsinline aria-label="{escape(_prompt(job), quote=True)}"></video>'
        )
    elif job.error is not None:
        text = "Stopped before it was done." if job.error.code == CANCELLED else escape(job.error.message)
        inner = f'<p class="note">{text}</p>'
    elif preview is not None:
        image = base64.b64encode(preview).decode()
        inner = f'<img class="preview" src="data:image/webp;base64,{image}" alt="Preview">'
    else:
        inner = f'<p class="note">{"Waiting for its turn" if job.status == "queued" else "Taking shape"}</p>'
    return f'<div class="stage">{inner}</div>'


def progress(job: StoredJob | None) -> str:
    """How far a job is, in a line and a bar; for a finished one, how long it took."""
    if job is None:
        return '<div class="progress"></div>'
    words = title(job)
    if job.status == "in_progress":
        words = PHASES.get(job.phase, "Starting")
        left = f"about {duration(job.seconds_left)} left" if job.seconds_left else ""
        bar = f'<div class="bar"><i style="width:{job.progress:.1f}%"></i></div>'
        return f'<div class="progress"><b>{words}</b><span>{left}</span><em>{job.progress:.0f} %</em>{bar}</div>'
    took = ""
    if job.status == "completed" and job.started_at and job.completed_at:
        took = f"made in {duration(job.completed_at - job.started_at)}"
    elif job.status == "queued":
        took = "you can close this page, it stays in the queue"
    return f'<div class="progress"><b>{words}</b><span>{took}</span></div>'


def details(job: StoredJob | None) -> str:
    """The prompt and every setting."""
    if job is None:
        return ""
    request = job.request
    rows = "".join(f"<div><dt>{name}</dt><dd>{escape(str(value(request)))}</dd></div>" for name, value in SETTINGS)
    negative = request.get("negative_prompt")
    without = f'<p class="negative"><b>Without:</b> {escape(negative)}</p>' if negative else ""
    link = ""
    if job.status == "completed":
        link = f'<a href="/v1/videos/{job.id}/content" download="{job.id}.mp4">Download the MP4</a>'
    made = time.strftime("%d %b %Y, %H:%M", time.localtime(job.created_at))
    return (
        f'<div class="details"><p class="prompt">{escape(_prompt(job))}</p>{without}<dl>{rows}</dl>'
        f'<p class="fine">{escape(job.model)} · {made} · <code>{job.id}</code> {link}</p></div>'
    )


def gallery(jobs: Sequence[StoredJob], chosen: str | None) -> str:
    """All videos as cards; a click on one chooses it."""
    if not jobs:
        return '<p class="fine">Your videos will be here.</p>'
    return f'<div class="cards">{"".join(_card(job, job.id == chosen) for job in jobs)}</div>'


def _card(job: StoredJob, chosen: bool) -> str:
    if job.status == "completed":
        picture = f'<img loading="lazy" src="/v1/videos/{job.id}/content?variant=thumbnail" alt="">'
        badge = ""
    else:
        picture, badge = "", f'<span class="badge {job.status}">{title(job)}</span>'
    bar = f'<i class="line" style="width:{job.progress:.0f}%"></i>' if job.status == "in_progress" else ""
    text = escape(_prompt(job), quote=True)
    return (
        f'<button type="button" class="card{" chosen" if chosen else ""}" data-id="{job.id}" title="{text}">'
        f'<span class="frame">{picture}{badge}{bar}</span><span class="caption">{text}</span></button>'
    )


def message(text: str, kind: str = "") -> str:
    """A line below the form: an answer, or what is wrong."""
    return f'<p class="message {kind}" role="status">{escape(text)}</p>' if text else ""


def plan_line(plan: dict[str, Any]) -> tuple[str, str]:
    """What the plan says, and the kind of message that it is."""
    from wanduet.config import format_bytes

    devices = " · ".join(
        f"{device['name']} {format_bytes(max(device['phases'].values(), default=0))}" for device in plan["devices"]
    )
    if plan["fits"]:
        seconds = plan.get("predicted_seconds", {}).get("total")
        return f"Fits: {devices}" + (f" · about {duration(seconds)}" if seconds else ""), "good"
    nearest = plan["nearest_that_fits"]
    known = {k: v for k, v in nearest[0].items() if not k.startswith("predicted")} if nearest else {}
    hint = " Try " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in known.items()) + "." if known else ""
    return f"Does not fit into this machine's memory ({devices}).{hint}", "bad"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _prompt(job: StoredJob) -> str:
    return str(job.request.get("prompt", ""))


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)
