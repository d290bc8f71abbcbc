"""The page's routes: its static files, login, and what it needs besides `/v1`. Every route but login and files needs a key."""

import hashlib
import secrets
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.concurrency import run_in_threadpool

from wanduet.config import EngineConfig
from wanduet.doors.http.bodies import read_fields
from wanduet.doors.http.context import KEY_COOKIE, ServerContext, find_owner, get_context, get_owner
from wanduet.doors.http.errors import ApiError
from wanduet.doors.http.events import OwnersStream
from wanduet.doors.http.keys import came_encrypted
from wanduet.doors.http.restore import add_restore
from wanduet.doors.page.actions import PageActions
from wanduet.doors.page.clips import Clip
from wanduet.doors.page.events import older, page_events
from wanduet.doors.page.forms import read_form
from wanduet.doors.page.words import plan_words, refusal
from wanduet.errors import WanduetError
from wanduet.jobs.records import StoredJob, UnknownJobError, is_job_id

STATIC = Path(__file__).with_name("static")
# Named here: the system's own table of types differs between machines, and Windows' registry can be wrong.
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
COOKIE_SECONDS = 30 * 24 * 3600
# Content of this server only, and no inline scripts or styles. `blob:` is a file that the visitor chose.
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
HTML_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "same-origin",  # with no-referrer, a form's Origin would be null
    "Cache-Control": "no-cache",
}

Context = Annotated[ServerContext, Depends(get_context)]
Owner = Annotated[str, Depends(get_owner)]


class StaticFile:
    """A file of the page, in memory, with its ETag."""

    def __init__(self, path: Path) -> None:
        self.content = path.read_bytes()
        self.media_type = MEDIA_TYPES[path.suffix]
        self.etag = f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'

    def answer(self, request: Request) -> Response:
        """Return the file; 304 if the browser has it."""
        kept = HTML_HEADERS | {"ETag": self.etag}
        tags = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self.etag in tags:
            return Response(status_code=304, headers=kept)
        return Response(self.content, media_type=self.media_type, headers=kept)


def static_files() -> dict[str, StaticFile]:
    """Return the page's files by their names."""
    return {path.name: StaticFile(path) for path in sorted(STATIC.iterdir()) if path.suffix in MEDIA_TYPES}


def mount_page(app: FastAPI, config: EngineConfig) -> FastAPI:
    """Add the page at `/` to a server's application."""
    actions = PageActions(app.state.context, config)
    app.include_router(page_router(actions))
    add_restore(app, actions.read)
    return app


def page_router(actions: PageActions) -> APIRouter:
    """Return the routes of the page at `/` and below `/page`."""
    router = APIRouter(include_in_schema=False)
    add_files(router, "index.html")
    add_login(router)
    _add_form_routes(router, actions)
    _add_job_routes(router, actions)
    return router


def add_files(router: APIRouter, page: str) -> None:
    """Add the routes of the static files; `page` is the one at `/`, which needs a key."""
    files = static_files()

    @router.get("/")
    def index(request: Request, context: Context) -> Response:
        if find_owner(context, request.headers) is None:
            return RedirectResponse("/login", 303)
        return files[page].answer(request)

    @router.get("/page/{name}.{kind}")
    def static(name: str, kind: str, request: Request) -> Response:
        if (found := files.get(f"{name}.{kind}")) is None or kind == "html":
            raise ApiError(404, "not_found", "Not Found")
        return found.answer(request)


def add_login(router: APIRouter) -> None:
    """Add the login, which keeps a key in a cookie."""
    form = (STATIC / "login.html").read_text("utf-8")

    @router.get("/login")
    def login() -> HTMLResponse:
        return HTMLResponse(form.replace("{message}", ""), headers=HTML_HEADERS)

    @router.post("/login")
    async def sign_in(request: Request, context: Context) -> Response:
        key = str((await read_fields(request)).get("key", "")).strip()
        if context.keys.owner(key) is None:
            refused = form.replace("{message}", escape("This key is not valid."))
            return HTMLResponse(refused, 401, headers=HTML_HEADERS)
        answer = RedirectResponse("/", 303)
        secure = came_encrypted(request.headers, request.url.scheme)
        answer.set_cookie(KEY_COOKIE, key, max_age=COOKIE_SECONDS, httponly=True, samesite="strict", secure=secure)
        return answer

    @router.post("/logout")
    def sign_out() -> Response:
        answer = RedirectResponse("/login", 303)
        answer.delete_cookie(KEY_COOKIE)
        return answer


def _add_form_routes(router: APIRouter, actions: PageActions) -> None:
    @router.get("/page/about", dependencies=[Depends(get_owner)])
    def about() -> dict[str, Any]:
        return actions.about()

    @router.post("/page/plan", dependencies=[Depends(get_owner)])
    async def plan(request: Request) -> dict[str, Any]:
        """The plan of the form in the body, or why there is none."""
        form = read_form(await read_fields(request))
        notes = actions.notes(form)
        try:
            return plan_words(await run_in_threadpool(actions.plan, form)) | {"notes": notes}
        except (WanduetError, ApiError) as error:
            return refusal(error, form) | {"notes": notes, "memory": [], "work": ""}

    @router.post("/page/fields", dependencies=[Depends(get_owner)])
    async def fields(request: Request) -> dict[str, Any]:
        """The `fields` of the form in the body, as `POST /v1/videos` takes them, or why it is refused."""
        form = read_form(await read_fields(request))
        try:
            return {"fields": await run_in_threadpool(actions.fields, form)}
        except (WanduetError, ApiError) as error:
            return {"refused": refusal(error, form)}

    @router.post("/page/follow", dependencies=[Depends(get_owner)])
    async def follow(request: Request) -> dict[str, Any]:
        """The size and the number of frames that follow from the form's input video."""
        return {"set": actions.follow(read_form(await read_fields(request)))}


def _add_job_routes(router: APIRouter, actions: PageActions) -> None:
    context, started = actions.context, secrets.token_hex(8)

    @router.get("/page/events")
    async def events(request: Request, owner: Owner) -> OwnersStream:
        news = page_events(actions, owner, started)
        return OwnersStream(context, request.headers, owner, context.page_streams, news)

    @router.get("/page/videos")
    def videos(owner: Owner, after: Annotated[str, Query(max_length=64)]) -> dict[str, Any]:
        """The videos before another one."""
        if not is_job_id(after):
            raise ApiError(400, "invalid_request", "after must be a video's id.", param="after")
        return older(actions, owner, after)

    @router.get("/page/videos/{video_id}")
    def video(video_id: str, owner: Owner) -> dict[str, Any]:
        """A video, and the form that makes it again."""
        job = _find(video_id, owner)
        form = actions.form_of(job)
        shown = {name: asdict(value) if isinstance(value, Clip) else value for name, value in form.items()}
        return {"video": actions.card(job), "form": shown}

    @router.post("/page/videos/{video_id}/again")
    async def again(video_id: str, request: Request, owner: Owner) -> dict[str, Any]:
        """Submit the fields in the body, with the input video of that one."""
        fields = await read_fields(request)
        await run_in_threadpool(get_owner, request)  # check again: a body takes time, and keys are revoked at once
        with context.submissions.enter():
            job = await run_in_threadpool(_find, video_id, owner)
            return actions.card(await run_in_threadpool(actions.again, owner, job, fields))

    def _find(video_id: str, owner: str) -> StoredJob:
        if not is_job_id(video_id):
            raise UnknownJobError(video_id)
        return context.store.get(video_id, owner)
