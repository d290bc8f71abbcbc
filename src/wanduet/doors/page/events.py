"""Handlers of the page's events: they get values from the browser and return updates of components."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
from starlette.datastructures import Headers

from wanduet.doors.http.context import find_owner
from wanduet.doors.http.errors import ApiError
from wanduet.doors.page import views
from wanduet.doors.page.actions import PageActions
from wanduet.doors.page.clips import Clip, Offer, offer_of
from wanduet.doors.page.forms import FILE_FIELDS, FORM_FIELDS, Form, needing
from wanduet.errors import WanduetError
from wanduet.jobs.records import OPEN_STATUSES, StoredJob

BUTTONS = ("cancel", "retry", "reseed", "again", "delete")


class PageEvents:
    """Handlers that Gradio calls with the visitor's request; they keep no state."""

    def __init__(self, actions: PageActions) -> None:
        self._actions = actions

    def look(
        self, chosen: str | None, displayed: str | None, pages: int, shown: dict[str, str], request: gr.Request
    ) -> list[Any]:
        """Return updates of what has changed since the last poll; the rest is skipped, so that a video plays on.

        The job is the one that was chosen, else the one that was `displayed`, else the newest. A poll that began
        before a click may end after it: so it never writes what is chosen, nor anything that it has not changed.
        """
        owner = self._owner(request)
        jobs, more = self._actions.jobs(owner, pages)
        known = self._actions.find(owner, chosen) or self._actions.find(owner, displayed)
        job = known or (jobs[0] if jobs else None)
        parts = {
            "top": self.header(jobs),
            "stage": self._stage(job),
            "progress": views.progress(job, _ahead(jobs, job)),
            "details": views.details(job),
            "gallery": views.gallery(jobs, job.id if job else None, more=more),
        }
        changed = [gr.skip() if shown.get(name) == text else text for name, text in parts.items()]
        state = "" if job is None else views.title(job)
        buttons = [gr.skip()] * len(BUTTONS) if shown.get("buttons") == state else _buttons(job)
        now = {**parts, "buttons": state}
        new = job.id if job else None
        return [*changed, *buttons, *[gr.skip() if old == it else it for old, it in ((displayed, new), (shown, now))]]

    def submit(self, request: gr.Request, *values: Any) -> tuple[Any, str, str]:
        """Submit the form; the last of `values` is the id of the job that is displayed now.

        If the browser has the form's file, return as JSON what the browser submits with it.
        """
        form, chosen = _form(values), values[-1]
        try:
            outgoing = self._actions.outgoing(form)
        except (WanduetError, ApiError) as error:
            return chosen, views.refusal(error), ""
        if outgoing is not None:
            return chosen, "", json.dumps(outgoing)
        return *self._try(lambda: self._actions.submit(self._owner(request), form), chosen), ""

    def sent(self, answer: str) -> list[Any]:
        """Display the job that the browser has submitted, or why it was refused; skip if it has submitted nothing."""
        reply = json.loads(answer or "{}")
        if reply.get("id"):
            return [str(reply["id"]), ""]
        text, param = str(reply.get("message") or ""), reply.get("param")
        return [gr.skip(), views.sent_refusal(text, param) if text else gr.skip()]

    def choose(self, pages: int, event: gr.EventData) -> list[Any]:
        """Handle a click on a card, or on the button for older ones."""
        data = _event_data(event)
        return [gr.skip(), pages + 1] if data.get("older") else [str(data.get("id")), gr.skip()]

    def stop(self, chosen: str | None, request: gr.Request) -> None:
        """Cancel the displayed job."""
        if chosen is not None:
            self._actions.cancel(self._owner(request), chosen)

    def remove(self, confirmed: bool, chosen: str | None, request: gr.Request) -> None:
        """Delete the displayed job, if the visitor confirmed it."""
        if confirmed and chosen is not None:
            self._actions.delete(self._owner(request), chosen)

    def reuse(self, chosen: str | None, request: gr.Request) -> list[Any]:
        """Copy the displayed job's settings to the form."""
        job = self._actions.find(self._owner(request), chosen)
        return _unchanged() if job is None else _values(self._actions.form_of(job))

    def retry(self, chosen: str | None, request: gr.Request) -> tuple[Any, str]:
        """Submit the displayed job again, with the same seed."""
        return self._repeat(chosen, request, new_seed=False)

    def reseed(self, chosen: str | None, request: gr.Request) -> tuple[Any, str]:
        """Submit the displayed job with a new seed; cancel it first if it has not finished."""
        self.stop(chosen, request)
        return self._repeat(chosen, request, new_seed=True)

    def defaults(self) -> list[Any]:
        """Reset the form's settings to the model's defaults: not the prompt, and not the input video."""
        kept = dict.fromkeys(["prompt", *FILE_FIELDS], gr.skip())
        return _values(self._actions.defaults() | kept)

    def recall(self, remembered: str | None) -> list[Any]:
        """Restore the form that this browser stored; missing fields get the model's defaults."""
        try:
            form = json.loads(remembered or "{}")
        except ValueError:
            form = None
        if not form or not isinstance(form, dict):
            return _unchanged()
        return _values({**self._actions.defaults(), **form, **dict.fromkeys(FILE_FIELDS)})

    def use(self, field: str) -> Callable[..., list[Any]]:
        """Return the handler of the panel for an input video: of a file that was read, and of its buttons.

        It returns the offer that is displayed, the panel, the message, and the form.
        """

        def handle(event: gr.EventData, shown: Offer | None, *values: Any) -> list[Any]:
            data, form = _event_data(event), _form(values)
            if isinstance(data.get("read"), dict):
                found = offer_of(data["read"])
                if found.form is None and found.clip is None:
                    error = views.message(found.error, "bad")
                    return [None, views.clip(form[field]) + error, gr.skip(), *_unchanged()]
                return [found, views.offer(found), gr.skip(), *_unchanged()]
            if shown is None:
                return [None, views.clip(None), gr.skip(), *_values(form | {field: None})]
            message: Any = gr.skip()
            if data.get("use") == "settings" and shown.form is not None:
                form = {**self._actions.defaults(), **shown.form, **dict.fromkeys(FILE_FIELDS)}
                message = views.message(f"These are the settings of {shown.name}. {shown.note}".strip())
            elif data.get("use") == "start" and shown.clip is not None:
                form = self._actions.follow(form, field, shown.clip)
            return [None, views.clip(form[field]), message, *_values(form)]

        return handle

    def show_clip(self, field: str) -> Callable[[Clip | None, Offer | None], list[Any]]:
        """Return the handler that displays the form's input video, unless another one is offered, and the fields that
        need one.
        """

        def handle(clip: Clip | None, shown: Offer | None) -> list[Any]:
            panel = gr.skip() if shown is not None else views.clip(clip)
            return [panel, *[gr.update(visible=clip is not None) for _ in needing(field)]]

        return handle

    def example(self, event: gr.EventData) -> str:
        """Return an example's text for the prompt."""
        return str(_event_data(event).get("prompt", ""))

    def answer(self, panel: str | None, *values: Any) -> list[Any]:
        """Return the presets that match the form, and the plan for it; skip all if `panel` shows this plan already."""
        form = _form(values)
        mark = views.mark_of(values[1:])  # the plan does not depend on the prompt
        if mark in (panel or ""):
            return [gr.skip()] * 4
        presets = self._actions.presets.chosen(form)
        try:
            content = views.plan_panel(self._actions.plan(form), views.settings_line(form))
        except (WanduetError, ApiError) as error:
            content = views.refusal(error)
        return [*presets, f"<div {mark}>{content}</div>"]

    def _repeat(self, chosen: str | None, request: gr.Request, *, new_seed: bool) -> tuple[Any, str]:
        owner = self._owner(request)
        job = self._actions.find(owner, chosen)
        if job is None:
            return chosen, ""
        return self._try(lambda: self._actions.repeat(owner, job, new_seed=new_seed), chosen)

    def _try(self, submit: Callable[[], StoredJob], chosen: Any) -> tuple[Any, str]:
        try:
            return submit().id, ""
        except (WanduetError, ApiError) as error:
            return chosen, views.refusal(error)

    def header(self, jobs: Sequence[StoredJob]) -> str:
        """Return the header for these jobs."""
        context = self._actions.context
        running, waiting = (sum(job.status == status for job in jobs) for status in ("in_progress", "queued"))
        return views.header(context.spec.name, context.worker_ready(), running, waiting, signed_in=context.require_key)

    def _stage(self, job: StoredJob | None) -> str:
        if job is None:
            return views.empty_stage(self._actions.presets.examples)
        running = job.status == "in_progress"
        return views.stage(job, self._actions.context.store.files.preview(job.id) if running else None)

    def _owner(self, request: gr.Request) -> str:
        owner = find_owner(self._actions.context, Headers(dict(request.headers)))
        if owner is None:
            raise gr.Error("Sign in again.")
        return owner


def _buttons(job: StoredJob | None) -> list[Any]:
    there, is_open = job is not None, job is not None and not job.finished
    failed = job is not None and job.error is not None
    return [
        gr.Button(visible=is_open),
        gr.Button(visible=failed),
        gr.Button("Cancel, try a new seed" if is_open else "Same with a new seed", visible=there),
        gr.Button(visible=there),
        gr.Button(visible=there),
    ]


def _ahead(jobs: Sequence[StoredJob], job: StoredJob | None) -> int:
    if job is None or job.status != "queued":
        return 0
    return sum(other.status in OPEN_STATUSES and other.id < job.id for other in jobs)


def _form(values: Sequence[Any]) -> Form:
    return dict(zip(FORM_FIELDS, values, strict=False))


def _values(form: Form) -> list[Any]:
    return [form[name] for name in FORM_FIELDS]


def _unchanged() -> list[Any]:
    return [gr.skip()] * len(FORM_FIELDS)


def _event_data(event: gr.EventData) -> dict[str, Any]:
    return event._data if isinstance(event._data, dict) else {}
