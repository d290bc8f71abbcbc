"""The web page: Gradio as a client of the job store. It makes no video itself, and every picture and video
comes from the server's own API.
"""

import json
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.datastructures import Headers

from wanduet.config import EngineConfig
from wanduet.errors import WanduetError
from wanduet.frontends import ui_views as views
from wanduet.frontends.http_context import ServerContext, find_owner
from wanduet.frontends.http_errors import ApiError
from wanduet.frontends.http_page import PageGate, add_login, add_restore
from wanduet.frontends.ui_actions import FIELDS, Form, PageActions
from wanduet.frontends.ui_style import CARD_CLICKS, CSS, RESTORE, RESTORE_CLICKS

SIZES = ("832x480", "480x832", "624x624", "1280x720", "720x1280", "1920x1080")
SMALL_SIZES = ("96x96", "128x128", "160x96", "96x160")
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
EXAMPLE = "A red fox walks through fresh snow at dawn, soft light, shallow depth of field"
SMALL_EXAMPLE = "a red circle moving left on a black background"


def mount_page(app: FastAPI, config: EngineConfig) -> FastAPI:
    """Put the page at `/` of a server's application."""
    context: ServerContext = app.state.context
    actions = PageActions(context, config)
    page = Page(actions)
    add_login(app)
    add_restore(app, actions.restore)
    app = gr.mount_gradio_app(
        app,
        page.build(),
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
    app.add_middleware(PageGate, context=context)
    return app


class Page:
    """The page's parts and what happens at each event."""

    def __init__(self, actions: PageActions) -> None:
        self._actions = actions

    def build(self) -> gr.Blocks:
        """The whole page."""
        with gr.Blocks(title="wanduet", analytics_enabled=False, fill_width=True) as page:
            self._chosen = gr.State(None)
            self._shown = gr.State({})
            self._remembered = gr.BrowserState(None, storage_key="wanduet-form", secret="wanduet")
            self._top = gr.HTML(elem_id="top")
            with gr.Row():
                with gr.Column(scale=4, min_width=340):
                    self._build_form()
                with gr.Column(scale=7, min_width=420):
                    self._build_stage()
            gr.Markdown("### Videos")
            self._gallery = gr.HTML(js_on_load=CARD_CLICKS)
            self._connect(page)
        return page

    def _build_form(self) -> None:
        start = self._actions.defaults()
        limits = self._actions.context.settings.limits
        small = start["size"] in SMALL_SIZES
        example = SMALL_EXAMPLE if small else EXAMPLE
        prompt = gr.Textbox(
            label="Prompt", lines=4, max_lines=10, max_length=limits.prompt, placeholder=example, autofocus=True
        )
        sizes = list(dict.fromkeys((start["size"], *(SMALL_SIZES if small else SIZES))))
        with gr.Row():
            size = gr.Dropdown(sizes, value=start["size"], label="Size", allow_custom_value=True, min_width=120)
            frames = gr.Slider(1, limits.frames, start["num_frames"], step=4, label="Frames", min_width=140, buttons=[])
        with gr.Row():
            steps = gr.Slider(
                1,
                min(100, limits.steps),
                start["num_inference_steps"],
                step=1,
                label="Steps",
                min_width=140,
                buttons=[],
            )
            guidance = gr.Slider(1, 15, start["guidance_scale"], step=0.5, label="Guidance", min_width=140, buttons=[])
        seed = gr.Number(None, label="Seed", precision=0, minimum=0, placeholder="Empty: a new one each time")
        with gr.Accordion("More settings", open=False):
            negative = gr.Textbox(start["negative_prompt"], label="Negative prompt", lines=2, max_lines=6)
            with gr.Row():
                shift = gr.Slider(0.5, 20, start["flow_shift"], step=0.5, label="Flow shift", min_width=140, buttons=[])
                fps = gr.Slider(1, 60, start["fps"], step=1, label="Frame rate", min_width=140, buttons=[])
            sampler = gr.Dropdown(["unipc", "dpm++2m", "euler"], value=start["sampler"], label="Sampler")
            with gr.Row():
                self._restore = gr.HTML(RESTORE, js_on_load=RESTORE_CLICKS)
                self._reset = gr.Button("Model's defaults", size="sm")
        self._generate = gr.Button("Generate", variant="primary")
        self._message = gr.HTML(elem_id="message")
        self._form: list[Any] = [
            prompt, negative, size, frames, steps, guidance, shift, sampler, fps, seed
        ]  # fmt: skip
        self._prompt = prompt

    def _build_stage(self) -> None:
        self._stage = gr.HTML(views.stage(None))
        self._progress = gr.HTML()
        with gr.Row(elem_id="actions"):
            self._cancel = gr.Button("Cancel", size="sm", visible=False)
            self._again = gr.Button("Use these settings", size="sm", visible=False)
            self._reseed = gr.Button("Same with a new seed", size="sm", visible=False)
            self._delete = gr.Button("Delete", size="sm", variant="stop", visible=False)
        self._details = gr.HTML()

    def _connect(self, page: gr.Blocks) -> None:
        seen = [self._chosen, self._shown]
        view = [
            self._top, self._stage, self._progress, self._details, self._gallery,
            self._cancel, self._again, self._reseed, self._delete, *seen,
        ]  # fmt: skip
        look: dict[str, Any] = {"fn": self._look, "inputs": seen, "outputs": view, **PRIVATE, "concurrency_limit": 8}

        page.load(self._recall, self._remembered, self._form, **PRIVATE).then(**look)
        page.load(self._look, seen, view, **PRIVATE)
        gr.Timer(1.0).tick(**look)
        submitted = [*self._form, self._chosen]
        for event in (self._generate.click, self._prompt.submit):
            event(self._submit, submitted, [self._chosen, self._message, self._remembered], **PRIVATE).then(**look)
        self._gallery.click(self._choose, None, self._chosen, **PRIVATE).then(**look)
        self._cancel.click(self._stop, self._chosen, None, **PRIVATE).then(**look)
        self._delete.click(
            self._remove, self._chosen, self._chosen, js="(id) => confirm('Delete this video?') ? id : null", **PRIVATE
        ).then(**look)
        self._again.click(self._reuse, self._chosen, self._form, **PRIVATE)
        self._reseed.click(self._repeat, self._chosen, [self._chosen, self._message], **PRIVATE).then(**look)
        self._reset.click(self._defaults, None, self._form, **PRIVATE)
        self._restore.click(self._take_settings, None, [*self._form, self._message], **PRIVATE)
        for part in self._form[2:7]:
            part.change(self._plan, self._form, self._message, trigger_mode="always_last", **PRIVATE)

    # What happens. Each gets who is asking from Gradio.

    def _look(self, chosen: str | None, shown: dict[str, str], request: gr.Request) -> list[Any]:
        """Everything that changed since the last look; what did not is left alone, so that a video plays on."""
        owner, context = self._owner(request), self._actions.context
        jobs = self._actions.jobs(owner)
        job = self._actions.find(owner, chosen) or (jobs[0] if jobs else None)
        running = job is not None and job.status == "in_progress"
        preview = context.store.files.preview(job.id) if job is not None and running else None
        waiting = sum(one.status == "queued" for one in jobs)
        parts = {
            "top": views.header(context.spec.name, context.worker_ready(), waiting),
            "stage": views.stage(job, preview),
            "progress": views.progress(job),
            "details": views.details(job),
            "gallery": views.gallery(jobs, job.id if job else None),
        }
        changed = [gr.skip() if shown.get(name) == text else text for name, text in parts.items()]
        states = f"{job is not None}{job is not None and not job.finished}"
        buttons: list[Any] = [gr.skip()] * 4
        if shown.get("buttons") != states:
            there, is_open = job is not None, job is not None and not job.finished
            buttons = [gr.Button(visible=is_open), *(gr.Button(visible=there) for _ in range(3))]
        return [*changed, *buttons, job.id if job else None, {**parts, "buttons": states}]

    def _submit(self, request: gr.Request, *values: Any) -> tuple[Any, str, Any]:
        form, chosen = dict(zip(FIELDS, values, strict=False)), values[-1]
        try:
            job = self._actions.submit(self._owner(request), form)
        except (WanduetError, ApiError) as error:
            return chosen, views.message(_told(error), "bad"), gr.skip()
        return job.id, "", json.dumps(form)

    def _choose(self, event: gr.EventData) -> str:
        return str(event.id)

    def _stop(self, chosen: str | None, request: gr.Request) -> None:
        if chosen is not None:
            self._actions.cancel(self._owner(request), chosen)

    def _remove(self, chosen: str | None, request: gr.Request) -> None:
        if chosen is not None:  # else the question was answered with no
            self._actions.delete(self._owner(request), chosen)

    def _reuse(self, chosen: str | None, request: gr.Request) -> list[Any]:
        job = self._actions.find(self._owner(request), chosen)
        return [gr.skip()] * len(FIELDS) if job is None else _values(self._actions.form_of(job.request))

    def _repeat(self, chosen: str | None, request: gr.Request) -> tuple[Any, str]:
        owner = self._owner(request)
        job = self._actions.find(owner, chosen)
        if job is None:
            return chosen, ""
        try:
            again = self._actions.submit(owner, {**self._actions.form_of(job.request), "seed": None})
        except (WanduetError, ApiError) as error:
            return chosen, views.message(_told(error), "bad")
        return again.id, ""

    def _defaults(self) -> list[Any]:
        return [gr.skip(), *_values(self._actions.defaults())[1:]]

    def _recall(self, remembered: str | None) -> list[Any]:
        """The form as it was sent last from this browser."""
        try:
            form = json.loads(remembered or "{}")
            return _values({**self._actions.defaults(), **{name: form[name] for name in FIELDS if name in form}})
        except (ValueError, TypeError):
            return [gr.skip()] * len(FIELDS)

    def _take_settings(self, event: gr.EventData) -> list[Any]:
        """What the server found in the video that was chosen."""
        told = event._data if isinstance(event._data, dict) else {}
        if not isinstance(told.get("form"), dict):
            return [*[gr.skip()] * len(FIELDS), views.message(str(told.get("error", "")), "bad")]
        form = {**self._actions.defaults(), **told["form"]}
        return [*_values(form), views.message("These are the settings of that video.")]

    def _plan(self, *values: Any) -> str:
        try:
            return views.message(*views.plan_line(self._actions.plan(dict(zip(FIELDS, values, strict=True)))))
        except (WanduetError, ApiError) as error:
            return views.message(_told(error), "bad")

    def _owner(self, request: gr.Request) -> str:
        owner = find_owner(self._actions.context, Headers(dict(request.headers)))
        if owner is None:
            raise gr.Error("Sign in again.")
        return owner


def _values(form: Form) -> list[Any]:
    return [form[name] for name in FIELDS]


def _told(error: WanduetError | ApiError) -> str:
    return " ".join(str(error).split())


def _theme() -> gr.themes.Base:
    """Plain, and with the system's own fonts: nothing is fetched."""
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
    )
