"""`wanduet serve`: the OpenAI videos protocol over the durable job store.

The server loads no model and has no queue in memory: it validates, stores and shows jobs. A separate worker process makes the
videos; the server restarts it when it dies.
"""

import signal
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.routing import NoMatchFound

from wanduet import __version__
from wanduet.config import EngineConfig
from wanduet.doors.http import errors, reference, videos
from wanduet.doors.http.context import ServerContext, ServerSettings, get_context, get_owner
from wanduet.doors.http.errors import ErrorBody
from wanduet.doors.http.keys import KEYS_FILE, KeyRing
from wanduet.doors.http.limits import BodyLimits, LetBodiesEnd, LimitBodies, LimitRequests
from wanduet.doors.http.listen import DRAIN_SECONDS, Announce, Server, listen
from wanduet.doors.http.loras import LoraList
from wanduet.doors.http.metrics import CountRequests, WorkerView
from wanduet.doors.http.public import public_text
from wanduet.doors.http.security import AnswerHead, Guard, check_bind
from wanduet.family.spec import ModelSpec
from wanduet.folders import never_make
from wanduet.jobs.files import JobFiles
from wanduet.jobs.library_logs import configure_library_logs
from wanduet.jobs.logs import configure_logs
from wanduet.jobs.store import JobStore
from wanduet.jobs.supervisor import WorkerProcess
from wanduet.jobs.webhooks import WebhookSender, WebhookSettings
from wanduet.jobs.worker import WorkerSettings
from wanduet.meta.prices import all_prices

if TYPE_CHECKING:
    from wanduet.cluster.settings import ClusterSettings

MountPage = Callable[[FastAPI, EngineConfig], FastAPI]


class Model(BaseModel):
    """A model that this server has."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "wanduet"
    # What `wanduet price` has measured of it on the server's machine: settings, and the price of each approximation.
    prices: list[dict[str, Any]] = []


class ModelList(BaseModel):
    """The models of this server."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """How the server is."""

    status: str
    version: str = __version__
    reason: str | None = None


def create_app(
    store: JobStore,
    spec: ModelSpec,
    settings: ServerSettings | None = None,
    *,
    keys: KeyRing | None = None,
    worker: WorkerView | None = None,
) -> FastAPI:
    """Return the application over a job store. `worker` says why no worker takes jobs, for `/ready` and for the metrics."""
    settings = settings or ServerSettings()
    context = ServerContext(store, spec, settings, keys or KeyRing(store.files.folder / KEYS_FILE), worker)
    # FastAPI's pages of documentation load scripts from other hosts: `/docs` is our own.
    app = FastAPI(title="wanduet", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.context = context
    errors.install(app, context.failures)
    app.include_router(videos.router)
    _add_service_routes(app)
    # Middleware added last runs first. Middleware that a page adds runs after these.
    app.add_middleware(
        LimitBodies,
        limits=BodyLimits(settings.max_body_bytes, settings.body_seconds, settings.max_input_bytes),
        draining=context.draining,
    )
    app.add_middleware(Guard, allowed_hosts=settings.allowed_hosts, allowed_origins=settings.allowed_origins)
    app.add_middleware(LimitRequests, gate=context.requests)
    app.add_middleware(AnswerHead)
    app.add_middleware(CountRequests, metrics=context.metrics)
    app.add_middleware(LetBodiesEnd)
    return app


def _add_service_routes(app: FastAPI) -> None:
    refused: dict[int | str, dict[str, Any]] = {401: {"model": ErrorBody}, 503: {"model": ErrorBody}}

    @app.get("/v1/models", response_model=ModelList, responses=refused, dependencies=[Depends(get_owner)])
    def list_models(request: Request) -> ModelList:
        """The models of this server."""
        return ModelList(data=[_model_of(get_context(request))])

    @app.get("/v1/models/{model:path}", response_model=Model, responses={**refused, 404: {"model": ErrorBody}})
    def retrieve_model(model: str, request: Request, _: str = Depends(get_owner)) -> Model:
        """One model."""
        found = _model_of(get_context(request))
        if model != (name := found.id):
            raise errors.ApiError(404, "model_not_found", f"This server has the model {name!r} only.", param="model")
        return found

    @app.get("/v1/loras", response_model=LoraList, responses=refused, dependencies=[Depends(get_owner)])
    def list_loras(request: Request) -> LoraList:
        """The LoRA that `loras` of a submission may name, and whether they fit this server's model."""
        return LoraList(data=get_context(request).loras.files())

    @app.get("/health", response_model=Health, response_model_exclude_none=True)
    async def health() -> Health:
        """Whether the process lives."""
        return Health(status="ok")

    @app.get("/ready", response_model=Health, responses={503: {"model": Health}})
    def ready(request: Request) -> Response:
        """Whether submissions are taken and some worker makes videos."""
        context = get_context(request)
        status, reason = "ready", None
        if context.draining.is_set():
            status = "draining"
        else:
            # Check the store first: an unreachable store is also the reason that there is no worker, and has its own
            # 503.
            context.store.list(limit=1)
            if (trouble := context.trouble) is not None:
                status, reason = "no worker", public_text(trouble)
        content = Health(status=status, reason=reason).model_dump(exclude_none=True)
        return JSONResponse(content, 200 if status == "ready" else 503)

    @app.get("/metrics", response_class=Response, responses=refused)
    def metrics(request: Request, owner: str = Depends(get_owner)) -> Response:
        """Prometheus metrics: of a key's own requests and jobs; of everything for an operator."""
        context = get_context(request)
        shown = context.metrics.show(None if context.keys.is_operator(owner) else owner)
        return Response(shown, media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    def docs(request: Request) -> Response:
        try:
            get_owner(request)
        except errors.ApiError:
            if "text/html" in request.headers.get("Accept", "") and has_login(app):
                return RedirectResponse("/login", 303)  # a browser, which cannot send a key by itself
            raise
        return HTMLResponse(reference.render(app.openapi()), headers={"Content-Security-Policy": reference.POLICY})


def has_login(app: FastAPI) -> bool:
    """Whether the application has a page, and so a form that keeps a key in a cookie."""
    try:
        return bool(app.url_path_for("login"))
    except NoMatchFound:
        return False


def _model_of(context: ServerContext) -> Model:
    """Return the served model, with what was measured of it: of its hash, where the server knows it, else of its name."""
    wanted = context.settings.model_hash or context.spec.name
    folder = context.store.files.folder / "measurements"
    prices = [
        {
            "card": one.about.get("card"),
            "settings": one.about.get("request"),
            "costs": [{"settings": settings} | price for settings, price in one.costs()],
        }
        for one in all_prices(folder)
        if wanted in (one.about.get("model"), one.about.get("name"), one.about.get("spec"))
    ]
    return Model(id=context.spec.name, prices=prices)


def serve(
    workers: "WorkerSettings | ClusterSettings",
    spec: ModelSpec,
    settings: ServerSettings | None = None,
    *,
    database_url: str | None = None,
    page: MountPage | None = None,
    announce: Announce = lambda url: None,
) -> None:
    """Serve a model until a signal stops it: the API in this process, the engine in a worker process or on a cluster.

    `workers` selects how videos are made: by one worker process, or by those that a cluster's controller starts; then
    `database_url` must be PostgreSQL's. `spec` is the model's, so that requests are checked without loading the model;
    `page` adds a web page to the application; `announce` is called with the server's URL. Raises ConfigError if the
    address is in use, or is reachable from other machines while no key is set.
    """
    settings = settings or ServerSettings()
    configure_logs()
    configure_library_logs()
    worker = workers if isinstance(workers, WorkerSettings) else workers.worker
    files = JobFiles(worker.config.data_folder)
    never_make(files.folder)
    keys = KeyRing(files.folder / KEYS_FILE)
    check_bind(settings.host, bool(keys.records()))
    with listen(settings.host, settings.port) as listener:  # before starting anything that takes jobs
        store: JobStore
        process: WorkerProcess
        if isinstance(workers, WorkerSettings):
            store = JobStore(files, database_url, retention_seconds=worker.retention_seconds)
            process = WorkerProcess(worker, database_url)
        else:
            assert database_url is not None, "a cluster's jobs are in PostgreSQL"
            store, process = _on_cluster(workers, database_url)
        with closing(store):
            settings = replace(settings, lora_dir=worker.config.lora_dir)
            app = create_app(store, spec, settings, keys=keys, worker=process)
            server = Server(app if page is None else page(app, worker.config), announce)
            with _sender(store, settings.webhooks):
                _run_both(server, listener, process)


def _sender(store: JobStore, webhooks: WebhookSettings) -> AbstractContextManager[None]:
    return WebhookSender(store, webhooks) if webhooks.secret else nullcontext()


def _run_both(server: Server, listener: socket.socket, process: WorkerProcess) -> None:
    """Run the server and its worker process; the worker is drained after the server, or killed if a second signal came."""
    # Uvicorn raises the signals it received again when it ends; they must not end this process before the worker
    # drains.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    process.start()
    try:
        server.run([listener])
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: process.kill())
        if server.force_exit:
            process.kill()
        process.stop(DRAIN_SECONDS)


def _on_cluster(cluster: "ClusterSettings", database_url: str) -> tuple[JobStore, WorkerProcess]:
    """Return the cluster's store and its controller process, in place of a local store and worker."""
    from wanduet.cluster.files import open_files
    from wanduet.cluster.process import ControllerProcess
    from wanduet.cluster.store import ClusterStore

    worker = cluster.worker
    files = open_files(worker.config.data_folder, cluster.storage)
    store = ClusterStore(files, database_url, retention_seconds=worker.retention_seconds)
    return store, ControllerProcess(cluster, store, database_url)
