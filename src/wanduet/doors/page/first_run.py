"""The page of a server whose model is not on this machine yet: it fetches the model, or takes the miniature instead.

The application is the server's own, with its keys and limits. Until there is a model, `/v1` answers 503.
"""

import signal
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from wanduet.config import EngineConfig
from wanduet.doors.http.context import ServerContext, ServerSettings, get_owner
from wanduet.doors.http.errors import ApiError, unavailable
from wanduet.doors.http.keys import KEYS_FILE, KeyRing
from wanduet.doors.http.listen import Announce, Server, listen
from wanduet.doors.http.server import create_app
from wanduet.doors.page.fetching import Fetch
from wanduet.doors.page.routes import add_files, add_login
from wanduet.errors import ConfigError, WanduetError
from wanduet.family.wan21 import WAN_1_3B
from wanduet.jobs.files import JobFiles
from wanduet.jobs.library_logs import configure_library_logs
from wanduet.jobs.logs import configure_logs
from wanduet.jobs.store import JobStore
from wanduet.weights.forms import FormName
from wanduet.weights.hub import local_model, open_model
from wanduet.weights.names import MINIATURE
from wanduet.weights.repository import is_offline

RETRY_SECONDS = 60


def is_missing(config: EngineConfig) -> bool:
    """Return whether the model must be fetched first, and may be. Raises WanduetError for one that is no model."""
    if local_model(config.model, config.revision, config.files) is not None or is_offline():
        return False
    try:
        open_model(config.model, config.revision, fetch=False)
    except WanduetError:
        return True
    return False


def wait_for_model(
    config: EngineConfig, settings: ServerSettings, database_url: str | None, announce: Announce, *, fetch: bool
) -> tuple[EngineConfig, ServerSettings] | None:
    """Serve the page until there is a model; return the settings with it, and with the port. None: a signal came.

    `fetch`: begin the download at once, and again a minute after each failure. Raises ConfigError if the address is in
    use.
    """
    configure_logs()
    configure_library_logs()
    files = JobFiles(config.data_folder)
    chosen: list[EngineConfig] = []

    def choose(model: str | None = None) -> None:
        chosen.append(config if model is None else replace(config, model=model, revision=None))
        server.should_exit = True

    download = Fetch(config, choose)
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with listen(settings.host, settings.port) as listener, closing(JobStore(files, database_url)) as store:
            settings = replace(settings, port=listener.getsockname()[1])
            server = Server(first_run_app(store, settings, download, choose), announce)
            if fetch:
                download.start(retry=True)
            server.run([listener])
    finally:
        download.stop()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return (chosen[0], settings) if chosen else None


def first_run_app(store: JobStore, settings: ServerSettings, fetch: Fetch, choose: Callable[[str], None]) -> FastAPI:
    """Return the application. `choose` is called with the miniature's name, if a visitor wants it."""
    keys = KeyRing(store.files.folder / KEYS_FILE)
    app = create_app(store, WAN_1_3B, settings, keys=keys, worker=fetch)
    app.user_middleware.append(Middleware(_NoModel, fetch=fetch))  # runs last: after keys and limits of bodies
    router = APIRouter(include_in_schema=False)
    add_files(router, "first.html")
    add_login(router)
    _add_routes(router, app.state.context, fetch, choose)
    app.include_router(router)
    return app


def _add_routes(router: APIRouter, context: ServerContext, fetch: Fetch, choose: Callable[[str], None]) -> None:
    own = not context.require_key  # with keys, others use the server: its model is the operator's choice

    @router.get("/page/model", dependencies=[Depends(get_owner)])
    def model() -> dict[str, Any]:
        """The model that is missing, and how far its download is."""
        return fetch.state() | {"miniature": own}

    @router.post("/page/model/fetch", dependencies=[Depends(get_owner)])
    def start(form: FormName | None = None) -> dict[str, Any]:
        """Begin the download of a form of the model; its own by default."""
        try:
            fetch.start(form)
        except ConfigError as error:
            raise ApiError(400, "invalid_request", str(error), param="form") from None
        return model()

    @router.post("/page/model/stop", dependencies=[Depends(get_owner)])
    def stop() -> dict[str, Any]:
        fetch.stop()
        return model()

    @router.post("/page/model/miniature", dependencies=[Depends(get_owner)])
    def miniature() -> dict[str, Any]:
        """Serve the miniature instead; what has been fetched stays."""
        if not own:
            raise ApiError(403, "forbidden", "Who runs this server chooses its model.")
        fetch.stop()
        choose(MINIATURE)
        return model()


class _NoModel:
    """Answers 503 in place of every route below `/v1`."""

    def __init__(self, app: ASGIApp, fetch: Fetch) -> None:
        self._app, self._fetch = app, fetch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            refused = unavailable("no_model", f"{self._fetch.trouble} The page at / offers to fetch it.", RETRY_SECONDS)
            await refused.response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)
