"""The web page: Gradio as a client of the job store.

It makes no videos; all pictures and videos come from the server's own API.
"""

import logging
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio import queueing, route_utils, routes
from starlette.middleware import Middleware

from wanduet.config import EngineConfig
from wanduet.doors.http.context import ServerContext
from wanduet.doors.http.restore import add_restore
from wanduet.doors.page import scripts, views
from wanduet.doors.page.actions import PageActions
from wanduet.doors.page.events import PageEvents
from wanduet.doors.page.forms import FILE_FIELDS, FORM_FIELDS, SIZE, Form, form_rows, needing, widget
from wanduet.doors.page.routes import PageGate, add_login, add_pulse, keep_page_off_api
from wanduet.doors.page.style import CSS

_gradio_log = logging.getLogger("gradio")

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
MAX_EVENTS = 1000  # in Gradio's queue, of all visitors together
QUICK: dict[str, Any] = {**PRIVATE, "queue": False}


def mount_page(app: FastAPI, config: EngineConfig) -> FastAPI:
    """Mount the page at `/` of a server's application."""
    _log_failed_events()
    context: ServerContext = app.state.context
    actions = PageActions(context, config)
    add_login(app)
    add_pulse(app)
    add_restore(app, actions.read)
    app = gr.mount_gradio_app(
        app,
        Page(actions).build(),
        path="/",
        show_error=True,
        footer_links=[],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
        theme=_theme(),
        css=CSS,
    )
    keep_page_off_api(app)
    # Innermost: the server's own checks of host, origin and body run before the page's.
    app.user_middleware.append(Middleware(PageGate, context=context))
    return app


def _log_failed_events() -> None:
    """Log an event's traceback, which Gradio would print to standard error with all that the visitor sent."""
    logged = SimpleNamespace(print_exc=lambda: _gradio_log.error("an event of the page failed", exc_info=True))
    for module in (queueing, routes, route_utils):
        module.__dict__["traceback"] = logged


class Page:
    """The page's components, and the handlers of their events."""

    def __init__(self, actions: PageActions) -> None:
        self._actions = actions
        self._events = PageEvents(actions)
        self._panels: dict[str, gr.HTML] = {}  # of input videos, by field

    def build(self) -> gr.Blocks:
        """Build the whole page."""
        with gr.Blocks(title="wanduet", analytics_enabled=False, fill_width=True) as page:
            self._chosen = gr.State(None)  # the job that the visitor chose last; no poll writes it
            self._job = gr.State(None)  # the job that the page shows; written by polls only
            self._pages = gr.State(1)
            self._shown = gr.State({})
            self._stored = gr.Textbox(visible=False)  # passes the browser's stored form to `recall`
            self._outgoing = gr.Textbox(visible=False)  # what the browser submits, and the answer
            self._confirmed = gr.Checkbox(visible=False)
            self._top = gr.HTML(self._events.header(()), elem_id="top", js_on_load=scripts.PULSE)
            with gr.Row(elem_id="desk"):
                with gr.Column(scale=4, min_width=320, elem_id="form"):
                    self._build_form()
                with gr.Column(scale=7, min_width=320, elem_id="result"):
                    self._build_stage()
            gr.HTML("<h2>Videos</h2>")
            self._gallery = gr.HTML(js_on_load=scripts.CARD_CLICKS)
            self._connect(page)
        return page.queue(max_size=MAX_EVENTS)

    def _build_form(self) -> None:
        presets, start, limits = self._actions.presets, self._actions.defaults(), self._actions.context.settings.limits
        prompt = gr.Textbox(
            label="Prompt",
            lines=4,
            max_lines=10,
            max_length=limits.prompt,
            placeholder=presets.examples[0],
            autofocus=True,
        )
        parts = {"prompt": prompt}
        for name in FILE_FIELDS:
            parts |= self._build_clip(name, start)
        shape, length, quality = presets.chosen(start)
        with gr.Row(elem_id="presets"):
            self._presets = [
                gr.Radio(list(presets.shapes), value=shape, label="Shape", min_width=120),
                gr.Radio(list(presets.lengths), value=length, label="Length", min_width=120),
                gr.Radio(list(presets.qualities), value=quality, label="Quality", min_width=120),
            ]
        with gr.Accordion("All settings", open=False, elem_id="settings"):
            parts |= self._build_settings(start)
            self._reset = gr.Button("Model's defaults", size="sm")
        self._plan = gr.HTML(elem_id="plan")
        self._generate = gr.Button("Generate", variant="primary", elem_id="generate")
        self._message = gr.HTML(elem_id="message")
        self._form: list[Any] = [parts[name] for name in FORM_FIELDS]

    def _build_settings(self, start: Form) -> dict[str, Any]:
        """Return the components of the settings, by name."""
        parts: dict[str, Any] = {}
        for row in form_rows():
            with gr.Row() if len(row) > 1 else nullcontext():
                for name in row:
                    parts[name] = self._build_field(name, start)
        return parts

    def _build_clip(self, name: str, start: Form) -> dict[str, Any]:
        """Return the components of an input video and of the fields that need it, by name."""
        script = scripts.CLIP + (scripts.DROP if name == FILE_FIELDS[0] else "")
        self._panels[name] = gr.HTML(views.no_clip(), js_on_load=script)
        return {part: self._build_field(part, start) for part in (name, *needing(name))}

    def _build_field(self, name: str, start: Form) -> Any:
        limits, value = self._actions.context.settings.limits, start[name]
        kind, arguments = self._size(value) if name == SIZE else widget(FORM_FIELDS[name], value, limits)
        return getattr(gr, kind)(**arguments)

    def _size(self, value: str) -> tuple[str, dict[str, Any]]:
        common = {"label": FORM_FIELDS[SIZE].label, "value": value, "min_width": 120}
        return "Dropdown", common | {"choices": self._actions.presets.sizes, "allow_custom_value": True}

    def _build_stage(self) -> None:
        self._stage = gr.HTML(
            views.empty_stage(self._actions.presets.examples), elem_id="stage", js_on_load=scripts.EXAMPLE_CLICKS
        )
        self._progress = gr.HTML()
        with gr.Row(elem_id="actions"):
            self._cancel = gr.Button("Cancel", size="sm", visible=False)
            self._retry = gr.Button("Try again", size="sm", visible=False)
            self._reseed = gr.Button("Same with a new seed", size="sm", visible=False)
            self._again = gr.Button("Use these settings", size="sm", visible=False)
            self._delete = gr.Button("Delete", size="sm", visible=False)
        self._details = gr.HTML()

    def _connect(self, page: gr.Blocks) -> None:
        on, chosen, form = self._events, self._chosen, self._form
        model = self._actions.context.spec.name
        job = self._job
        seen = [chosen, job, self._pages, self._shown]
        view = [
            self._top, self._stage, self._progress, self._details, self._gallery,
            self._cancel, self._retry, self._reseed, self._again, self._delete, job, self._shown,
        ]  # fmt: skip
        look: dict[str, Any] = {"fn": on.look, "inputs": seen, "outputs": view, **PRIVATE, "concurrency_limit": 8}
        page.load(**look)
        gr.Timer(1.0).tick(**look)

        recall = scripts.storage_script(scripts.RECALL, model)
        recalled = page.load(on.recall, self._stored, form, js=recall, **PRIVATE)
        recalled = recalled.then(None, None, None, js=scripts.storage_script(scripts.RECALLED, model))
        answer: dict[str, Any] = {
            "fn": on.answer,
            "inputs": [self._plan, *form],
            "outputs": [*self._presets, self._plan],
            **PRIVATE,
        }
        recalled.then(**answer)
        gr.on([part.change for part in form[1:]], **answer, trigger_mode="always_last")
        # Responses may arrive out of order, so that the last one may be for an earlier form: poll as well.
        gr.Timer(2.0).tick(**answer)
        remember = scripts.storage_script(scripts.REMEMBER, model)
        gr.on([part.change for part in form], None, form, None, js=remember, **QUICK)
        gr.on([part.change for part in form], None, self._message, self._message, js=scripts.FORGET_REFUSAL, **QUICK)
        presets = self._actions.presets
        by_name = dict(zip(FORM_FIELDS, form, strict=True))
        for row, (name, values) in zip(self._presets, presets.rows.items(), strict=True):
            row.input(None, row, by_name[name], js=scripts.preset_script(values), **QUICK)

        result = [chosen, self._message]
        for event in (self._generate.click, form[0].submit):
            submitted = event(on.submit, [*form, chosen], [*result, self._outgoing], **PRIVATE)
            sent = submitted.then(None, self._outgoing, self._outgoing, js=scripts.SEND, **PRIVATE)
            sent.then(on.sent, self._outgoing, result, **PRIVATE).then(**look)
        self._retry.click(on.retry, job, result, **PRIVATE).then(**look)
        self._reseed.click(on.reseed, job, result, **PRIVATE).then(**look)
        self._cancel.click(on.stop, job, None, **PRIVATE).then(**look)
        inputs = [self._confirmed, job]
        self._delete.click(on.remove, inputs, None, js=scripts.CONFIRM, **PRIVATE).then(**look)
        self._gallery.click(on.choose, self._pages, [chosen, self._pages], **PRIVATE).then(**look)
        self._stage.click(on.example, None, form[0], **PRIVATE)
        self._again.click(on.reuse, job, form, **PRIVATE)
        self._reset.click(on.defaults, None, form, **PRIVATE)
        for name, panel in self._panels.items():
            offer, needs = gr.State(None), [by_name[other] for other in needing(name)]
            panel.click(on.use(name), [offer, *form], [offer, panel, self._message, *form], **PRIVATE)
            by_name[name].change(on.show_clip(name), [by_name[name], offer], [panel, *needs], **PRIVATE)


def _theme() -> gr.themes.Base:
    """Return a plain theme with the system's fonts: nothing is downloaded."""
    return gr.themes.Base(
        primary_hue="stone",
        secondary_hue="stone",
        neutral_hue="stone",
        radius_size="md",
        font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    ).set(
        button_primary_background_fill="*primary_900",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
        button_primary_background_fill_dark="*primary_100",
        button_primary_background_fill_hover_dark="*primary_300",
        button_primary_text_color_dark="*primary_900",
        color_accent="#c2410c",
        slider_color="#c2410c",
    )
